"""The arguments of audio_kv for one layer as one object. Importing this needs no triton."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

# Those that have gradients, and those that turn keys.
PROJECTION = ("states", "norm_weight", "k_weight", "v_weight", "k_bias", "v_bias", "k_norm_weight")
TURNS = ("cos", "sin")


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
        return tuple(getattr(self, field.name) for field in fields(self))

    def tensors(self) -> dict[str, Tensor]:
        """Those that are given."""
        return {name: x for name in (*PROJECTION, *TURNS) if (x := getattr(self, name)) is not None}

    def numbers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_kv_heads", "eps", "norm_offset")}

    @property
    def rows(self) -> Tensor:
        """The states as (A * N, d)."""
        return self.states.reshape(self.states.shape[0] * self.states.shape[1], self.states.shape[2])

    @property
    def head_dim(self) -> int:
        return self.k_weight.shape[0] // self.num_kv_heads

    @property
    def has_finish(self) -> bool:
        """Whether keys change after their projection."""
        return self.k_norm_weight is not None or self.cos is not None

    def heads(self, projected: Tensor) -> Tensor:
        """(A * N, Hkv * D) as (A, N, Hkv, D)."""
        return projected.view(*self.states.shape[:2], self.num_kv_heads, self.head_dim)
