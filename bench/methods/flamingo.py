"""Flamingo: gated cross-attention to the audio, in new layers between the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from palkernels.bench.methods.base import Style
from palkernels.bench.methods.lal import Lal
from palkernels.model.causal_lm.attached import HANDLE
from palkernels.model.causal_lm.flamingo import attach_flamingo

__all__ = ["Flamingo"]

EVERY = 4  # model layers to one of Flamingo's


class Flamingo(Lal):
    """The comparison: gated cross-attention and a new FFN before every fourth layer (once in a model with fewer), whose
    parameters train along."""

    name = "flamingo"
    label = "Flamingo"
    about = (
        f"gated cross-attention to the audio and an FFN, new weights, before every {EVERY}th layer (of fewer, the last)"
    )
    style = Style("#d67bb0", "*")
    step = None

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        handle = attach_flamingo(model, every=min(EVERY, model.config.num_hidden_layers), impl=impl)
        try:
            yield handle.implementation()
        finally:
            handle.detach()

    def added_parameters(self, model: Any) -> list[nn.Parameter]:
        return list(getattr(model, HANDLE).layers.parameters())

    def as_keys(self, audio_tokens: int) -> int:
        return 0  # the model's own layers see no audio
