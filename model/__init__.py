"""The Hugging Face layer. Every public name is here, and loads its own room only when it is first asked for.

    causal_lm/     attach: a stock causal LM takes audio as extra keys and values (LAL), or by Flamingo
    audio/         files and waveforms, within limits, as an encoder's input features
    encoders/      Whisper, CLAP and SSLAM
    connectors/    from an encoder's states to the language model's width
    pal/           the whole audio LLM: config, model, processor
    building/      an audio LLM from the checkpoints of its parts
    evaluation/    what a model answers, compared with what it should have said
    vllm/          the plugin by which vLLM serves a saved audio LLM

``from palkernels.model import attach`` loads no encoder, no connector and no audio LLM. Yet ``import palkernels.model``
is enough for transformers' Auto classes to load a saved audio LLM, model type "pal": :mod:`palkernels.model.auto` gives
them stand-ins, which load :mod:`palkernels.model.pal` when a saved model needs it.
"""

from typing import TYPE_CHECKING

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "palkernels.model needs transformers: pip install 'palkernels[model]'", name=error.name
    ) from error

from palkernels import lazy as _lazy
from palkernels.model import auto as _auto

if TYPE_CHECKING:
    from palkernels.model.audio.files import load_audio
    from palkernels.model.audio.limits import AudioError
    from palkernels.model.building import build
    from palkernels.model.causal_lm.attach import attach
    from palkernels.model.causal_lm.config import LalConfig
    from palkernels.model.causal_lm.encoded import EncodedAudio
    from palkernels.model.causal_lm.flamingo import FlamingoHandle, attach_flamingo
    from palkernels.model.causal_lm.freezing import freeze_ffn
    from palkernels.model.causal_lm.gated_layer import FlamingoConfig, GatedLayer
    from palkernels.model.causal_lm.handle import LalHandle
    from palkernels.model.causal_lm.report import LalReport
    from palkernels.model.causal_lm.state import AudioState
    from palkernels.model.connectors.base import Connector
    from palkernels.model.connectors.lfst import LfstConnector
    from palkernels.model.connectors.mlp import MlpConnector
    from palkernels.model.connectors.qformer import QFormerConnector
    from palkernels.model.connectors.registry import CONNECTORS
    from palkernels.model.encoders.base import Tower
    from palkernels.model.encoders.clap import ClapTower
    from palkernels.model.encoders.registry import TOWERS
    from palkernels.model.encoders.sslam import SslamTower
    from palkernels.model.encoders.whisper import WHISPER_SIZES, WhisperAudioEncoder, WhisperTower
    from palkernels.model.evaluation.evaluate import evaluate
    from palkernels.model.evaluation.scores import Scores
    from palkernels.model.pal import PalConfig, PalForConditionalGeneration, PalProcessor
    from palkernels.model.pal.clips import AudioFeatures
    from palkernels.model.pal.conversation import Conversation
    from palkernels.model.pal.tokenizer import AUDIO_TOKEN, byte_tokenizer

__all__ = [
    "AUDIO_TOKEN",
    "CONNECTORS",
    "TOWERS",
    "WHISPER_SIZES",
    "AudioError",
    "AudioFeatures",
    "AudioState",
    "ClapTower",
    "Connector",
    "Conversation",
    "EncodedAudio",
    "FlamingoConfig",
    "FlamingoHandle",
    "GatedLayer",
    "LalConfig",
    "LalHandle",
    "LalReport",
    "LfstConnector",
    "MlpConnector",
    "PalConfig",
    "PalForConditionalGeneration",
    "PalProcessor",
    "QFormerConnector",
    "Scores",
    "SslamTower",
    "Tower",
    "WhisperAudioEncoder",
    "WhisperTower",
    "attach",
    "attach_flamingo",
    "build",
    "byte_tokenizer",
    "evaluate",
    "freeze_ffn",
    "load_audio",
]

_NAMES_BY_MODULE = {
    "audio.files": ("load_audio",),
    "audio.limits": ("AudioError",),
    "building": ("build",),
    "causal_lm.attach": ("attach",),
    "causal_lm.config": ("LalConfig",),
    "causal_lm.encoded": ("EncodedAudio",),
    "causal_lm.flamingo": ("FlamingoHandle", "attach_flamingo"),
    "causal_lm.freezing": ("freeze_ffn",),
    "causal_lm.gated_layer": ("FlamingoConfig", "GatedLayer"),
    "causal_lm.handle": ("LalHandle",),
    "causal_lm.report": ("LalReport",),
    "causal_lm.state": ("AudioState",),
    "connectors.base": ("Connector",),
    "connectors.lfst": ("LfstConnector",),
    "connectors.mlp": ("MlpConnector",),
    "connectors.qformer": ("QFormerConnector",),
    "connectors.registry": ("CONNECTORS",),
    "encoders.base": ("Tower",),
    "encoders.clap": ("ClapTower",),
    "encoders.registry": ("TOWERS",),
    "encoders.sslam": ("SslamTower",),
    "encoders.whisper": ("WHISPER_SIZES", "WhisperAudioEncoder", "WhisperTower"),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.scores": ("Scores",),
    "pal": ("PalConfig", "PalForConditionalGeneration", "PalProcessor"),
    "pal.clips": ("AudioFeatures",),
    "pal.conversation": ("Conversation",),
    "pal.tokenizer": ("AUDIO_TOKEN", "byte_tokenizer"),
}
if not TYPE_CHECKING:
    __getattr__, __dir__ = _lazy.exports(
        __name__, {name: f"{__name__}.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}
    )

_auto.register()
