"""What every encoder has as a part of a model: weights from a seed, a frozen state, a config that rebuilds it.

    tower = TOWERS["sslam"].from_checkpoint("/models/sslam")
    input_features, state_lengths = tower.features([clip, other])   # (samples,) tensors at tower.sampling_rate
    states = tower(input_features)                                  # (B, N, tower.hidden_size)

    again = TOWERS["sslam"](**tower.config)                         # JSON: the same tower, other weights
    again.load_state_dict(tower.state_dict())
    features = TOWERS["sslam"].make_features(tower.config)          # without weights: what a processor needs

    tower      states                                                           valid of a clip
    whisper    1500, every 20 ms                                                ceil(samples / 320)
    clap       64: 32 steps of time, each low band then high                    2 * ceil(samples / 15000)
    sslam      512: 64 steps of time, each 8 bands from low to high             8 per 16 frames of 10 ms begun

A clip's first `state_lengths` states are valid. They are those of the clip encoded alone: every clip is padded to the
encoder's window, and nothing depends on the rest of the batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init

from palkernels.errors import one_line
from palkernels.model.audio.features import Features
from palkernels.model.encoders.weights import build_seeded, tensor_faults

__all__ = ["Tower"]


class Tower(nn.Module):
    """An audio encoder as a part of a model.

    Frozen by default: its parameters ask for no gradient, and it stays in evaluation mode when the model around it
    trains. With `freeze=False` both are as in any module. It computes in float32 unless converted with `.to(dtype)`.

    Made under `torch.device("meta")` it has no weights yet; otherwise they are drawn on the CPU from `seed`, and the
    global random state is left as it was.

    Attributes:
        layout: What errors call the encoder that the tower reads from checkpoints.
        sampling_rate: Of the waveforms, in Hz.
        hidden_size: Width of the states.
        config: The constructor's arguments, as JSON can hold them.
        features: Turns waveforms into `input_features` and `state_lengths`; see `palkernels.model.audio.features`.
        encoder: The network.
    """

    layout: ClassVar[str]

    def __init__(self, make: Callable[[], nn.Module], hidden_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        if not isinstance(config["freeze"], bool):
            raise ValueError(f"freeze must be True or False, got {config['freeze']!r}")
        self.config = config
        self.hidden_size = hidden_size
        self.features = self.make_features(config)
        without_weights = torch.get_default_device().type == "meta"
        try:
            encoder = make() if without_weights else build_seeded(make, config["seed"])
        except (RuntimeError, TypeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"settings must describe an encoder, got {one_line(error, with_type=True)}") from error
        self._adopt(encoder, initialized=not without_weights)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, freeze: bool = True) -> Self:
        """Return a tower with the weights of a checkpoint on this machine; nothing is downloaded.

        Raises:
            ValueError: There is no such checkpoint, or it is not one of this encoder.
        """
        raise NotImplementedError

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> Features:
        """Return what turns waveforms into `input_features` for a tower of this config; needs no weights."""
        raise NotImplementedError

    @property
    def attn_implementation(self) -> str:
        """How the encoder attends, by transformers' name."""
        config: Any = self.encoder.config
        name: str = config._attn_implementation
        return name

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Let the encoder attend by "eager", "sdpa" or what else it has of transformers' implementations.

        Raises:
            ValueError, ImportError: The encoder has no such implementation.
        """
        self.encoder.set_attn_implementation(attn_implementation)  # type: ignore[operator]

    def reset_parameters(self) -> None:
        """Give the weights the values that the constructor draws from the seed, but for those of a checkpoint, which
        transformers marks."""
        drawn = type(self)(**self.config)
        for mine, its in ((self.parameters(), drawn.parameters()), (self.buffers(), drawn.buffers())):
            for tensor, value in zip(mine, its, strict=True):
                init.copy_(tensor, value)

    def _encode(self, input_features: Tensor) -> Tensor:
        """Return the states of features that have been checked."""
        raise NotImplementedError

    def _adopt(self, encoder: nn.Module, initialized: bool = True) -> Self:
        """Take `encoder` for the network; `initialized` says that its weights have their values."""
        self.encoder = encoder
        if self.config["freeze"]:
            self.requires_grad_(False)
        self.train(self.training)
        if initialized:
            # Else a transformers model around this one draws the weights anew, loaded ones too, in its post_init.
            for module in self.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the tensors of another tower of this config's shape, as `torch.nn.Module` does.

        Raises:
            RuntimeError: With `strict`, tensors are missing, unexpected or of another shape; nothing is loaded.
        """
        expected, tower = self.state_dict(), f"this {type(self).__name__}"
        faults = tensor_faults(expected.keys(), state_dict.keys(), tower, self.layout) if strict else None
        if faults is not None:
            if {f"encoder.{name}" for name in state_dict} == expected.keys():
                faults += "; tower.encoder.load_state_dict takes an encoder's own"
            elif state_dict.keys() - expected.keys():
                faults += f"; {type(self).__name__}.from_checkpoint reads a directory with {self.layout}"
            raise RuntimeError(f"state_dict must hold {faults}")
        for name, tensor in expected.items():
            if strict and state_dict[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} as its config says, got {tuple(state_dict[name].shape)}"
                raise RuntimeError(f"state_dict must hold {name} of {tower} with shape {shapes}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def sampling_rate(self) -> int:
        return self.features.sampling_rate

    def train(self, mode: bool = True) -> Self:
        """Set training mode, or stay in evaluation mode if frozen."""
        return super().train(mode and not self.config["freeze"])

    def forward(self, input_features: Tensor) -> Tensor:
        """Return the states (B, N, hidden_size) of `input_features` (B, *features.shape), in the weights' dtype.

        The features may have another dtype, but must be on the weights' device.

        Raises:
            ValueError: The features have another shape.
        """
        shape = self.features.shape
        if input_features.ndim != 1 + len(shape) or input_features.shape[1:] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"input_features must have shape (B, {expected}), got {tuple(input_features.shape)}")
        dtype = next(weight.dtype for weight in self.encoder.parameters() if weight.is_floating_point())
        return self._encode(input_features.to(dtype))


def configured(config_class: Any, known: tuple[str, ...], settings: dict[str, Any], **fixed: Any) -> Any:
    """Return a transformers configuration with `settings`, each of a name in `known`, and `fixed` ones.

    Raises:
        ValueError: A setting is unknown, or transformers refuses its value.
    """
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"settings must be among {', '.join(known)}, got {', '.join(unknown)}")
    try:
        return config_class(**settings, **fixed)
    except Exception as error:  # transformers has an error class of its own for a value of another type
        raise ValueError(
            f"settings must be those of {config_class.__name__}, got {one_line(error, with_type=True)}"
        ) from error


def plain_settings(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the named settings of a transformers configuration as JSON can hold them."""
    values = {name: getattr(config, name) for name in names}
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in values.items()}
