"""The Hugging Face layer: :func:`attach` makes a stock causal LM take audio as extra keys and values."""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "palkernels.model needs transformers: pip install 'palkernels[model]'", name=error.name
    ) from error

from palkernels.model.causal_lm.attach import attach
from palkernels.model.causal_lm.config import LalConfig
from palkernels.model.causal_lm.freezing import freeze_ffn
from palkernels.model.causal_lm.handle import LalHandle
from palkernels.model.causal_lm.report import LalReport
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.modeling_pal import AudioFeatures, PalForConditionalGeneration
from palkernels.model.pal.processing_pal import PalProcessor

__all__ = [
    "AudioFeatures",
    "AudioState",
    "LalConfig",
    "LalHandle",
    "LalReport",
    "PalConfig",
    "PalForConditionalGeneration",
    "PalProcessor",
    "attach",
    "freeze_ffn",
]
