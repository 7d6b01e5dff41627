"""The Hugging Face layer: :func:`attach` makes a stock causal LM take audio as extra keys and values."""

from palkernels.model.attach import LalConfig, LalHandle, LalReport, attach
from palkernels.model.audio_state import AudioState

__all__ = ["AudioState", "LalConfig", "LalHandle", "LalReport", "attach"]
