"""What every connector has in common: how it is called, the config that rebuilds it, and the checks of its inputs.

All are used alike: ``connect(states, lengths)`` gives states and lengths for an ``AudioState``, and ``config`` holds
the arguments that make another of the same shape, ``CONNECTORS[name](**config)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from palkernels import devices

__all__ = ["Connector", "States", "cut_padding", "cut_paddings"]

States = Tensor | tuple[Tensor, ...]  # of one encoder, or of several
# Of the point that start_at moves states to: its root mean square, about that of what an MlpConnector as drawn makes;
# and by how much smaller than drawn the last layer's weights become, so that states scatter little around it.
START_SIZE, START_SCATTER = 0.25, 0.15


class Connector(nn.Module):
    """From audio encoders' states to states of the language model's width.

    Attributes:
        tower_types: Types of the towers whose states it fuses, in order, as configurations name them; None: it takes
            the states of one tower, of any type.
        config: The constructor's arguments by name, as JSON can hold them.
    """

    tower_types: ClassVar[tuple[str, ...] | None] = None
    config: dict[str, Any]

    @property
    def attn_implementation(self) -> str | None:
        """How it attends, by transformers' name; None where there is one way, or nothing to attend to."""
        return None

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Attend by "eager", "sdpa" or what else there is of transformers' implementations, where there are several.

        Raises:
            ValueError, ImportError: There is no such implementation.
        """

    def connect(self, states: States, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return states for the language model, and how many of each clip's are valid.

        Valid states do not depend on padding, neither on its content nor on its length: :func:`cut_padding` may cut it
        off before.

        Args:
            states: (B, N, input size) of one encoder; of several, a tuple with one tensor each.
            lengths: (B,), integers: valid states of each clip, which come first; None: all N.

        Returns:
            states (B, M, hidden_size) and lengths (B,), int64; None where ``lengths`` is None.

        Raises:
            TypeError, ValueError: The states or lengths do not fit the connector or each other.
        """
        raise NotImplementedError

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return how many states of each clip :meth:`connect` makes valid, given ``lengths`` (B,); needs no weights."""
        return lengths.long()

    def start_at(self, direction: Tensor) -> None:
        """Let the states that the weights as drawn would scatter around 0 scatter closely around a direction instead.

        Args:
            direction: (hidden_size,), of length 1.
        """
        raise NotImplementedError


def start_linear_at(linear: nn.Linear, direction: Tensor) -> None:
    """Let a last layer's outputs scatter as :meth:`Connector.start_at` says."""
    with torch.no_grad():
        linear.weight.mul_(START_SCATTER)
        linear.bias.copy_(start_point(direction))


def start_point(direction: Tensor) -> Tensor:
    """Return the point (hidden_size,) that states scatter around, which lies in a direction of length 1."""
    return direction * (START_SIZE * math.sqrt(direction.numel()))


def check_positive(**sizes: object) -> None:
    """Raise a ValueError for a size that is not a positive integer."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def check_heads(num_heads: int, width: int) -> None:
    """Raise a ValueError if the heads do not divide the width."""
    if width % num_heads:
        raise ValueError(f"num_heads must divide the width {width}, got {num_heads}")


def checked_states(states: States, input_size: int) -> Tensor:
    """Return the states (B, N, input_size) of one encoder, after checking that they are.

    Raises:
        TypeError, ValueError: The states are no tensor, or have another shape.
    """
    if not isinstance(states, Tensor):
        raise TypeError(f"states must be one tensor, got {describe(states)}")
    if states.ndim != 3 or states.shape[2] != input_size:
        raise ValueError(f"states must have shape (B, N, {input_size}), got {tuple(states.shape)}")
    return states


def checked_lengths(lengths: Tensor | None, states: Tensor) -> Tensor | None:
    """Return the lengths (B,) as int64, after checking that they fit ``states`` (B, N, ...). Values are checked where
    :func:`values_are_checked`.

    Raises:
        TypeError, ValueError: The lengths are no integers, have another shape or are not from 0 to N.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be a tensor of integers, got {describe(lengths)}")
    if lengths.shape != states.shape[:1]:
        raise ValueError(f"lengths must have shape ({states.shape[0]},), got {tuple(lengths.shape)}")
    most = states.shape[1]
    if values_are_checked(lengths) and bool(((lengths < 0) | (lengths > most)).any()):
        raise ValueError(f"lengths must be from 0 to {most}, got {lengths.tolist()}")
    return lengths.long()


def values_are_checked(lengths: Tensor) -> bool:
    """Return whether errors look at values: on the CPU only, as elsewhere it would wait for the device."""
    return devices.is_host(lengths.device) and has_values(lengths)


def has_values(*tensors: Tensor) -> bool:
    """Return whether tensors have values to look at: not under torch.compile, fake or on the meta device."""
    return not torch.compiler.is_compiling() and not any(tensor.is_meta or is_fake(tensor) for tensor in tensors)


def cut_padding(states: States, lengths: Tensor | None) -> States:
    """Return the states up to the longest clip's last valid one, at least one: (B, max(lengths), input size).

    Of several encoders the first's are cut, which the lengths count. Lengths on a GPU are read, once. Nothing is cut
    without lengths, where they have no values (under torch.compile, fake tensors), and where they do not fit the
    states, which :meth:`Connector.connect` then refuses.
    """
    (cut,) = cut_paddings([states], [lengths])
    return cut


def cut_paddings(states: Sequence[States], lengths: Sequence[Tensor | None]) -> list[States]:
    """Return what :func:`cut_padding` makes of the states of several connectors, all lengths read together."""
    cut = list(states)
    bounds: dict[int, Tensor] = {}
    for i, (inputs, valid) in enumerate(zip(cut, lengths, strict=True)):
        first = _first(inputs)
        if valid is not None and first is not None and _fit(valid, first) and has_values(valid, first):
            bounds[i] = torch.stack([valid.min(), valid.max()]).long()
    if not bounds:
        return cut
    device = next(iter(bounds.values())).device
    values = torch.stack([bound.to(device) for bound in bounds.values()]).tolist()
    for i, (least, most) in zip(bounds, values, strict=True):
        inputs, first = cut[i], _first(cut[i])
        if first is None or least < 0 or most >= first.shape[1]:
            continue
        shorter = first[:, : max(most, 1)]
        cut[i] = shorter if isinstance(inputs, Tensor) else (shorter, *inputs[1:])
    return cut


def _first(states: States) -> Tensor | None:
    """Return the first encoder's states, None for what is no states."""
    first = states if isinstance(states, Tensor) else next(iter(states), None)
    return first if isinstance(first, Tensor) and first.ndim > 1 else None


def _fit(lengths: Tensor, states: Tensor) -> bool:
    """Return whether lengths are integers, one for each of the states' clips, of which there is at least one."""
    if not isinstance(lengths, Tensor) or lengths.shape != states.shape[:1] or not lengths.numel():
        return False
    return not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)


def valid_mask(lengths: Tensor, states: Tensor) -> Tensor:
    """Return (B, N), bool: True for the states that ``lengths`` (B,) says are valid."""
    return torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)


def stacked(states: Tensor, lengths: Tensor | None, stack: int) -> tuple[Tensor, Tensor | None]:
    """Join every ``stack`` neighbouring states to one, the last ones with zeros for those that are not there.

    Of states a, b, c a stack of 2 makes two, [a b] and [c 0], as in Ultravox and Voxtral. States beyond a clip's length
    count as zeros, whatever they hold.

    Args:
        states: (B, N, width).
        lengths: (B,) valid states of each clip; None: all.
        stack: How many states are joined.

    Returns:
        states (B, ceil(N / stack), stack * width), and the lengths (B,) in them, None where ``lengths`` is None.
    """
    if stack == 1:
        return states, lengths
    if lengths is not None:
        states = states.masked_fill(~valid_mask(lengths, states).unsqueeze(-1), 0)
    states = nn.functional.pad(states, (0, 0, 0, -states.shape[1] % stack))
    states = states.reshape(states.shape[0], states.shape[1] // stack, stack * states.shape[2])
    return states, None if lengths is None else stacked_lengths(lengths, stack)


def stacked_lengths(lengths: Tensor, stack: int) -> Tensor:
    """Return the lengths (B,) of clips whose every ``stack`` states are joined to one, int64."""
    return -(-lengths.long() // stack)


def describe(value: object) -> str:
    """Return what an error calls a value of another type."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
