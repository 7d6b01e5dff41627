"""The arguments of one call of attention, and of one layer's projection, as one object each.

Everything between the public functions and the kernels takes these instead of seventeen arguments. Needs torch only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

FLOATS = ("query", "key", "value", "audio_key", "audio_value")
INTEGERS = ("audio_lengths", "audio_index", "audio_visible_from", "text_start", "text_end")
PACKING = ("cu_seqlens", "cu_audio")
SCALES = ("audio_key_scale", "audio_value_scale")
TENSORS = (*FLOATS, *INTEGERS, *SCALES, *PACKING)
NUMBERS = ("scale", "softcap", "window", "max_seqlen", "max_audio")
# The arguments of audio_kv that have gradients, and the tables of the rotation, which have none.
PROJECTION = ("states", "norm_weight", "k_weight", "v_weight", "k_bias", "v_bias", "k_norm_weight")
TURNS = ("cos", "sin")


@dataclass(frozen=True)
class Call:
    """One call of attention. Field names, order and shapes are those of :func:`palkernels.lal_attention`.

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
    audio_key_scale: Tensor | None = None  # (A, Hkv), where audio keys and values have eight bits
    audio_value_scale: Tensor | None = None

    def arguments(self) -> tuple[Any, ...]:
        """The fields in their order, as the operators take them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def of(cls, tensors: Sequence[Any], numbers: Sequence[Any]) -> "Call":
        """The call of what :meth:`tensors` and :meth:`numbers` return, or of the first of them."""
        values = dict(zip(TENSORS, tensors, strict=False)) | dict(zip(NUMBERS, numbers, strict=False))
        return cls(**values)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple([getattr(self, name) for name in TENSORS])

    def numbers(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in NUMBERS])

    def floats(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FLOATS}

    def integers(self) -> dict[str, Tensor]:
        """The integer tensors that are not None."""
        return {name: value for name in (*INTEGERS, *PACKING) if (value := getattr(self, name)) is not None}

    def scales(self) -> dict[str, Tensor]:
        """The scales of keys and values in eight bits that are not None."""
        return {name: value for name in SCALES if (value := getattr(self, name)) is not None}

    def options(self) -> dict[str, Any]:
        """The keyword arguments of :func:`palkernels.reference.lal_attention`, except ``return_lse``."""
        return {name: getattr(self, name) for name in (*INTEGERS, "scale", "softcap", "window")}

    @property
    def num_batches(self) -> int:
        """B, the number of text rows."""
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def num_audio_rows(self) -> int:
        """A."""
        return self.audio_key.shape[0] if self.cu_audio is None else self.cu_audio.shape[0] - 1

    @property
    def num_queries(self) -> int:
        """T; where rows are packed, the longest row's."""
        return self.query.shape[2] if self.max_seqlen is None else self.max_seqlen

    @property
    def num_keys(self) -> int:
        """S; where rows are packed, the longest row's."""
        return self.key.shape[2] if self.max_seqlen is None else self.max_seqlen

    @property
    def num_audio(self) -> int:
        """N; where rows are packed, the longest audio row's."""
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
        """Whether there are first visible positions, a softcap or a window: kernels then take more registers."""
        return any(option is not None for option in (self.audio_visible_from, self.softcap, self.window))


@dataclass(frozen=True)
class Projection:
    """One layer's arguments of :func:`palkernels.audio_kv`; ``cos`` and ``sin`` are (A or 1, N, R)."""

    states: Tensor  # (A, N, d)
    norm_weight: Tensor  # (d,)
    k_weight: Tensor  # (Hkv * D, d)
    v_weight: Tensor  # (Hkv * D, d)
    k_bias: Tensor | None  # (Hkv * D,)
    v_bias: Tensor | None
    k_norm_weight: Tensor | None  # (D,)
    cos: Tensor | None
    sin: Tensor | None
    num_kv_heads: int
    eps: float
    norm_offset: float

    def arguments(self) -> tuple[Any, ...]:
        """The fields in their order, as the operators take them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None."""
        return {name: x for name in (*PROJECTION, *TURNS) if (x := getattr(self, name)) is not None}

    def numbers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_kv_heads", "eps", "norm_offset")}

    @property
    def flat_states(self) -> Tensor:
        """The states as (A * N, d)."""
        return self.states.reshape(self.states.shape[0] * self.states.shape[1], self.states.shape[2])

    @property
    def head_dim(self) -> int:
        return self.k_weight.shape[0] // self.num_kv_heads

    @property
    def has_finish(self) -> bool:
        """Whether keys change after their projection: by a head norm, by RoPE."""
        return self.k_norm_weight is not None or self.cos is not None

    def heads(self, projected: Tensor) -> Tensor:
        """(A * N, Hkv * D) as (A, N, Hkv, D)."""
        return projected.view(*self.states.shape[:2], self.num_kv_heads, self.head_dim)
