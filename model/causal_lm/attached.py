"""What every attached model has, whichever way its layers take audio."""

import functools
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from palkernels.model.causal_lm.audio_parts import NAME, AudioParts, tied, unwrapped
from palkernels.model.causal_lm.encoded import EncodedAudio
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
        self.guard: RemovableHandle | None = None  # the hook that sees whether forward is still ours
        self._parts: AudioParts | None = None  # while attached, a submodule of the model too
        self._trains = False  # whether the parts are meant to train, until a training step has seen whether they do

    def add_parts(self, parts: AudioParts) -> None:
        """Make the connector and the projectors a submodule of the model.

        Raises:
            ValueError: the model holds one of them already, which would be in its parameters twice; or peft's adapters
                hold weights for them and would not load them.
        """
        if any(NAME in (getattr(x, "modules_to_save", None) or ()) for x in peft_configs(self.model)):
            raise ValueError(f"attach must come before peft's adapters, which hold {NAME} among their modules_to_save")
        held = {id(module) for module in self.model.modules()}
        if any(id(module) in held for module in parts.modules()):
            raise ValueError("connector and projectors must not be parts of the model already, got one that is")
        self._parts = parts
        self._trains = any(parameter.requires_grad for parameter in parts.parameters())
        self.model.add_module(NAME, parts)

    def remove_parts(self) -> None:
        """Take connector and projectors out of the model; the handle keeps them."""
        if self._parts is not None:
            self._parts = unwrapped(self.parts)
            delattr(self.model, NAME)

    @property
    def parts(self) -> nn.Module | None:
        """The submodule that holds connector and projectors, as the model has it: peft may have wrapped it."""
        return None if self._parts is None else self.model._modules.get(NAME, self._parts)

    def check_training(self) -> None:
        """Warn, once, of connectors that something has left out of training, or out of what is saved."""
        if not self._trains or torch.compiler.is_compiling():
            return
        self._trains = False
        parts = ((name, part) for name, part in self.model.named_parameters() if name.startswith(f"{NAME}."))
        trained = [name for name, part in parts if part.requires_grad]
        if not trained:
            warnings.warn(
                "the connector is not trained: its weights were frozen after attach (peft's get_peft_model does so, "
                f'unless it is given modules_to_save=["{NAME}"])',
                stacklevel=2,
            )
        elif peft_configs(self.model) and not any(x in name for name in trained for x in ("modules_to_save.", "lora_")):
            warnings.warn(
                "peft does not save the connector: attach first, and give get_peft_model "
                f'modules_to_save=["{NAME}"]; or save it by handle.save',
                stacklevel=2,
            )

    def without_gradients(self, audio: AudioState | None, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return a forward's arguments, such that parts which its audio does not pass get a gradient of zeros.

        DDP and FSDP2 wait for the gradient of every parameter that trains, also where a batch is without audio.
        """
        parts = self.parts
        if parts is None or not (self.model.training and torch.is_grad_enabled()):
            return arguments
        self.check_training()
        if audio is not None and audio.requires_grad:
            return arguments
        if not any(parameter.requires_grad for parameter in parts.parameters()):
            return arguments
        return tied(arguments, parts(None), self.model.get_input_embeddings())

    def save_parts(self, directory: "str | os.PathLike[str]", state_dict: Mapping[str, Tensor] | None) -> Path:
        """Write what :func:`attach` loads again: settings, connector and projectors."""
        raise NotImplementedError

    def connected(self, audio: object) -> Any:
        """Return audio that has passed the connector."""
        if isinstance(audio, EncodedAudio):
            raise TypeError("audio must be an AudioState where attach was given no connector, got an EncodedAudio")
        return audio

    @abstractmethod
    def request(self, state: AudioState, texts: Texts, *, keep: bool) -> Request:
        """Check what a forward was given, and prepare its audio for the layers.

        Args:
            keep: whether K and V are kept in the request for the steps that follow.

        Raises:
            TypeError, ValueError: texts, audio and model do not fit each other.
        """

    @abstractmethod
    def begin(self, audio: AudioState, arguments: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
        """Return the request of a forward with audio, and the forward's arguments, by name."""

    @abstractmethod
    def detach(self) -> None:
        """Make the model a stock one again; a second call does nothing."""

    def prepared(self, request: Request, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with which the stock forward hands its layers the request."""
        request.consumed, request.ran = set(), True
        return {**arguments, REQUEST_KEYWORD: Carried(request)}

    @abstractmethod
    def check_layers(self) -> None:
        """Check, where this takes audio through the layers' own modules, that these are what they were at attach."""

    def check_consumed(self, request: Request) -> None:
        """Check, after a forward, that all its layers have taken the audio.

        Raises:
            RuntimeError: a layer that should take the audio did not.
        """
        if request.consumed != set(self.selected):
            missed = sorted(set(self.selected) - request.consumed)
            raise RuntimeError(f"every selected layer must take the audio, but layers {missed} did not")

    def check_holes(self, texts: Texts, *, keep: bool) -> None:
        """Refuse padding within texts where a sliding window would count it.

        Our layers' windows count tokens; caches drop keys by columns, and stock layers' masks count those.
        """
        config = self.model.config
        types = getattr(config, "layer_types", None)
        windowed = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
        if types is not None:
            windowed = "sliding_attention" in types
        uncached = isinstance(texts.num_cached, int) and texts.num_cached == 0 and not keep
        if windowed and not (uncached and len(self.selected) == len(self.decoder_layers)):
            raise ValueError(
                "attention_mask must mark one run of tokens per row where layers have sliding windows and text is "
                "cached or some layers see no audio, got a mask with holes"
            )

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


def peft_configs(model: PreTrainedModel) -> list[Any]:
    """Return the configs of the adapters that peft has put into a model."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    return list(configs.values())
