"""What every attached model has, whichever way its layers take audio."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from palkernels.model.causal_lm.layers import Rotary
from palkernels.model.causal_lm.request import REQUEST_KEYWORD, Carried, Request
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.texts import Texts

HANDLE = "_palkernels_handle"  # on an attached model: its handle


class Attached(ABC):
    """The handle of a model whose methods take audio: what those methods and a generate call need of it.

    Args:
        model: the model, whose methods :func:`~palkernels.model.causal_lm.patching.patch` replaces.
        decoder_layers: its decoder layers.
        rotary: its rotary embedding.
        selected: the indices of the layers that take audio, or before which a new layer does.
    """

    def __init__(
        self, model: PreTrainedModel, decoder_layers: Sequence[nn.Module], rotary: Rotary, selected: tuple[int, ...]
    ) -> None:
        self.model = model
        self.decoder_layers = decoder_layers
        self.rotary = rotary
        self.selected = selected
        # By name, the methods that the instance itself had before it was attached (accelerate's hooks put some there).
        self.replaced: dict[str, Callable[..., Any] | None] = {}

    @abstractmethod
    def request(self, state: AudioState, texts: Texts, *, keep: bool) -> Request:
        """Check what a forward was given, and prepare its audio for the layers.

        Args:
            keep: whether K and V are kept in the request for the steps that follow.

        Raises:
            TypeError, ValueError: texts, audio and model do not fit each other.
        """

    @abstractmethod
    def forward(self, audio: AudioState, arguments: dict[str, Any]) -> Any:
        """Run one forward with audio; ``arguments`` by name."""

    @abstractmethod
    def detach(self) -> None:
        """Make the model a stock one again; a second call does nothing."""

    def run(self, request: Request, arguments: dict[str, Any]) -> Any:
        """Run the stock forward, its layers given the request.

        Raises:
            RuntimeError: a layer that should take the audio did not.
        """
        request.consumed, request.ran = set(), True
        outputs = self.stock("forward")(**arguments, **{REQUEST_KEYWORD: Carried(request)})
        if request.consumed != set(self.selected):
            missed = sorted(set(self.selected) - request.consumed)
            raise RuntimeError(f"every selected layer must take the audio, but layers {missed} did not")
        return outputs

    def stock(self, name: str) -> Callable[..., Any]:
        """Return one of the model's methods as it was before."""
        replaced = self.replaced[name]
        return functools.partial(getattr(type(self.model), name), self.model) if replaced is None else replaced

    def is_attached(self) -> bool:
        """Return whether the model's handle is this one, still."""
        return handle_of(self.model) is self


def handle_of(model: PreTrainedModel) -> Attached | None:
    """Return an attached model's handle, or None where it is a stock model."""
    handle: Attached | None = getattr(model, HANDLE, None)
    return handle
