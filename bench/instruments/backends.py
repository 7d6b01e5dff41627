"""Which of SDPA's backends is the fastest for a model's attention on its device."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from palkernels.bench.machine import sync

__all__ = ["fastest_backend"]

CANDIDATES = {"cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION), "cpu": (SDPBackend.FLASH_ATTENTION,)}
ROWS, TOKENS, REPEATS = 8, 1024, 5


def fastest_backend(model: Any) -> SDPBackend:
    """Timed once per device, dtype and shape of heads: forward and backward of a causal sequence. A backend that cannot
    do that, or a single query, is out."""
    config, weight = model.config, model.get_input_embeddings().weight
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _fastest(weight.device, weight.dtype, heads, config.num_key_value_heads, head_dim)


@functools.cache
def _fastest(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> SDPBackend:
    candidates = CANDIDATES[device.type]
    if len(candidates) == 1:
        return candidates[0]

    def attend(tokens: int) -> None:
        query = torch.randn(ROWS, heads, tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
        key = torch.randn(ROWS, kv_heads, TOKENS, head_dim, device=device, dtype=dtype, requires_grad=True)
        scaled_dot_product_attention(query, key, key, is_causal=tokens == TOKENS, enable_gqa=True).sum().backward()  # type: ignore[no-untyped-call]

    seconds: dict[SDPBackend, float] = {}
    with torch.enable_grad(), torch.random.fork_rng(devices=[device]):
        for backend in candidates:
            try:
                with sdpa_kernel(backend):
                    attend(1)
                    attend(TOKENS)
                    sync(device)
                    start = time.perf_counter()
                    for _ in range(REPEATS):
                        attend(TOKENS)
                    sync(device)
            except RuntimeError:
                continue
            seconds[backend] = time.perf_counter() - start
    if not seconds:
        raise RuntimeError(f"one of {', '.join(x.name for x in candidates)} must run on {device} in {dtype}, got none")
    return min(seconds, key=lambda backend: seconds[backend])
