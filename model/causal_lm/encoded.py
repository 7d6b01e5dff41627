"""What a caller says about audio that has not passed the connector yet."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class EncodedAudio:
    """An encoder's states for one batch of texts, given as ``audio=`` to a model that has a connector from ``attach``.

    ``forward`` and ``generate`` send it through the connector, as ``handle.state`` does, which takes the same
    arguments. So a data collator can make it, and what wraps the model (DDP, FSDP2) sees the connector run within.

    Args:
        encoded: (A, N, input size), or a tuple of them where a connector of ours joins several encoders.
        lengths: (A,) valid states of the encoder, of several those of the first; None: all.
        index, insert_at: as in AudioState.
    """

    encoded: Tensor | tuple[Tensor, ...]
    lengths: Tensor | None = None
    index: Tensor | None = None
    insert_at: Tensor | None = None

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "EncodedAudio":
        """Return the audio on another device, the encoder's states in another dtype; itself where nothing changes.

        accelerate and the Trainer call this to move what they feed to a model.
        """

        def moved(value: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
            if isinstance(value, tuple):
                parts = tuple(part.to(device, dtype, non_blocking=non_blocking) for part in value)
                return value if all(new is old for new, old in zip(parts, value, strict=True)) else parts
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=non_blocking)

        changes = {field.name: moved(getattr(self, field.name)) for field in fields(self)}
        if all(new is getattr(self, name) for name, new in changes.items()):
            return self
        return replace(self, **changes)  # type: ignore[arg-type]
