"""Which of SDPA's backends is the fastest for a model's attention on its device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from palkernels.bench.instruments.timing import fastest_seconds
from palkernels.model.causal_lm.layers import head_dim_of

__all__ = ["fastest_backend"]

CANDIDATES = {"cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION), "cpu": (SDPBackend.FLASH_ATTENTION,)}
BATCH, TOKENS, CALLS = 8, 1024, 5


def fastest_backend(model: Any) -> SDPBackend:
    """Return the backend that is fastest in forward and backward of a causal sequence with the model's heads.

    It is timed once per device, dtype and shape of heads. A backend that cannot do that, or a single query, is out.

    Raises:
        RuntimeError: no backend can.
    """
    config, weight = model.config, model.get_input_embeddings().weight
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return _fastest(weight.device, weight.dtype, *heads, head_dim_of(config))


@functools.cache
def _fastest(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> SDPBackend:
    candidates = CANDIDATES[device.type]
    if len(candidates) == 1:
        return candidates[0]

    def attend(queries: int) -> None:
        query = torch.randn(BATCH, heads, queries, head_dim, device=device, dtype=dtype, requires_grad=True)
        key = torch.randn(BATCH, kv_heads, TOKENS, head_dim, device=device, dtype=dtype, requires_grad=True)
        scaled_dot_product_attention(query, key, key, is_causal=queries == TOKENS, enable_gqa=True).sum().backward()  # type: ignore[no-untyped-call]

    seconds: dict[SDPBackend, float] = {}
    with torch.enable_grad(), torch.random.fork_rng(devices=[device]):
        for backend in candidates:
            try:
                with sdpa_kernel(backend):
                    attend(1)
                    seconds[backend] = fastest_seconds(lambda: attend(TOKENS), device, calls=CALLS)
            except RuntimeError:
                continue
    if not seconds:
        raise RuntimeError(f"one of {', '.join(x.name for x in candidates)} must run on {device} in {dtype}, got none")
    return min(seconds, key=lambda backend: seconds[backend])
