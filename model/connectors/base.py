"""What every connector has in common: how it is called, the config that rebuilds it, and the checks of its inputs.

All are used alike: ``connect(states, lengths)`` gives states and lengths for an ``AudioState``, and ``config`` holds
the arguments that make another of the same shape, ``CONNECTORS[name](**config)``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Connector", "States"]

States = Tensor | tuple[Tensor, ...]  # of one encoder, or of several


class Connector(nn.Module):
    """From audio encoders' states to states of the language model's width.

    Attributes:
        tower_types: Types of the towers whose states it fuses, in order, as configurations name them; None: it takes
            the states of one tower, of any type.
        config: The constructor's arguments by name, as JSON can hold them.
    """

    tower_types: ClassVar[tuple[str, ...] | None] = None
    config: dict[str, Any]

    def connect(self, states: States, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return states for the language model, and how many of each clip's are valid.

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
    """Return the lengths (B,) as int64, after checking that they fit ``states`` (B, N, ...). Values are checked on the
    CPU only: elsewhere it would wait for the device.

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
    if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > most)).any()):
        raise ValueError(f"lengths must be from 0 to {most}, got {lengths.tolist()}")
    return lengths.long()


def valid_mask(lengths: Tensor, states: Tensor) -> Tensor:
    """Return (B, N), bool: True for the states that ``lengths`` (B,) says are valid."""
    return torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)


def describe(value: object) -> str:
    """Return what an error calls a value of another type."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
