"""Audio from one device to another, as accelerate and the Trainer move what they feed to a model."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class Movable:
    """Base of a dataclass whose fields are tensors, sequences of tensors, or None."""

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> Self:
        """Return the audio on another device, floating-point tensors in another dtype; the object itself where nothing
        changes."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.init}  # type: ignore[arg-type]
        moved = {name: _moved(value, device, dtype, non_blocking) for name, value in given.items()}
        if all(moved[name] is value for name, value in given.items()):
            return self
        return replace(self, **moved)  # type: ignore[type-var]


def _moved(value: Any, device: Any, dtype: torch.dtype | None, non_blocking: bool) -> Any:
    if isinstance(value, Sequence):
        parts = [_moved(part, device, dtype, non_blocking) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return tuple(parts) if isinstance(value, tuple) else parts
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None, non_blocking=non_blocking)
