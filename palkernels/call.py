"""The arguments of one attention call, as one object. Importing this needs no triton."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

FLOATS = ("query", "key", "value", "audio_key", "audio_value")
INTEGERS = ("audio_lengths", "audio_index", "audio_visible_from", "text_start", "text_end")


@dataclass(frozen=True)
class Call:
    """Field names, order and shapes are those of :func:`palkernels.lal_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    audio_key: Tensor
    audio_value: Tensor
    audio_lengths: Tensor | None
    audio_index: Tensor | None
    audio_visible_from: Tensor | None
    text_start: Tensor | None
    text_end: Tensor | None
    scale: float | None = None  # None until it is filled in
    softcap: float | None = None
    window: int | None = None

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS}

    def integers(self) -> dict[str, Tensor]:
        """Those that are given."""
        return {name: value for name in INTEGERS if (value := getattr(self, name)) is not None}

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*INTEGERS, "scale", "softcap", "window")}

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a K/V head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def is_intricate(self) -> bool:
        """With first visible positions, a softcap or a window kernels take more registers."""
        return any(option is not None for option in (self.audio_visible_from, self.softcap, self.window))
