"""The Hugging Face layer: :func:`attach` makes a stock causal LM take audio as extra keys and values."""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "palkernels.model needs transformers: pip install 'palkernels[model]'", name=error.name
    ) from error

from palkernels.model.attach import LalConfig, LalHandle, LalReport, attach
from palkernels.model.audio_state import AudioState
from palkernels.model.training import freeze_ffn

__all__ = ["AudioState", "LalConfig", "LalHandle", "LalReport", "attach", "freeze_ffn"]
