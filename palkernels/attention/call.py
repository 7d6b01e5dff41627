"""The arguments of one call of attention as one object. Importing this needs no triton."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

FLOATS = ("query", "key", "value", "audio_key", "audio_value")
INTEGERS = ("audio_lengths", "audio_index", "audio_visible_from", "text_start", "text_end")
PACKING = ("cu_seqlens", "cu_audio")


@dataclass(frozen=True)
class Call:
    """Field names, order and shapes are those of :func:`palkernels.lal_attention`.

    With ``cu_seqlens`` rows are packed, as in :func:`palkernels.lal_attention_varlen`: the tensors are
    (1, heads, tokens of all rows, D), ``audio_visible_from`` is (1, audio tokens of all rows).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    audio_key: Tensor
    audio_value: Tensor
    audio_lengths: Tensor | None = None
    audio_index: Tensor | None = None
    audio_visible_from: Tensor | None = None
    text_start: Tensor | None = None
    text_end: Tensor | None = None
    scale: float | None = None  # None until it is filled in
    softcap: float | None = None
    window: int | None = None
    cu_seqlens: Tensor | None = None  # (B + 1,)
    cu_audio: Tensor | None = None  # (A + 1,)
    max_seqlen: int | None = None
    max_audio: int | None = None

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS}

    def integers(self) -> dict[str, Tensor]:
        """Those that are given."""
        return {name: value for name in (*INTEGERS, *PACKING) if (value := getattr(self, name)) is not None}

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*INTEGERS, "scale", "softcap", "window")}

    @property
    def num_batches(self) -> int:
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def num_audio_rows(self) -> int:
        return self.audio_key.shape[0] if self.cu_audio is None else self.cu_audio.shape[0] - 1

    @property
    def num_queries(self) -> int:
        """T; of packed rows the longest's, as in the two below."""
        return self.query.shape[2] if self.max_seqlen is None else self.max_seqlen

    @property
    def num_keys(self) -> int:
        return self.key.shape[2] if self.max_seqlen is None else self.max_seqlen

    @property
    def num_audio(self) -> int:
        return self.audio_key.shape[2] if self.max_audio is None else self.max_audio

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
