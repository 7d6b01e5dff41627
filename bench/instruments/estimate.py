"""How long a run will take, from the work to do and a short look at how fast this machine is.

An estimate to plan a coffee by, not a result: it counts matrix multiplications, the optimizer's and the
logits' memory traffic and the weights that decoding reads, and takes the speed of one matrix product and one
copy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from palkernels.bench.machine import sync

__all__ = ["Rates", "calibrate", "infer_seconds", "train_seconds"]

# The share of those two speeds that whole steps reached: 0.57 to 0.69 on two CPU cores.
_EFFICIENCY = 0.62
# How often the logits are read or written, in float32: cast, softmax, loss and their gradients.
_LOGITS_PASSES = 8
# How often AdamW passes over the weights: it reads weight, gradient and moments, and writes weight and moments.
_ADAMW_PASSES = 7


@dataclass(frozen=True)
class Rates:
    """What a step on this machine does per second in one dtype."""

    flops: float
    bytes: float


@torch.no_grad()
def calibrate(device: torch.device, dtype: torch.dtype) -> Rates:
    """About a second of matrix products and copies."""
    rows, width = (512, 2048) if device.type == "cpu" else (4096, 4096)
    a = torch.ones(rows, width, device=device, dtype=dtype)
    b = torch.ones(4 * width, width, device=device, dtype=dtype)
    source = torch.ones(64 * 2**20, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def seconds(work: Any) -> float:
        work()  # the first call also builds kernels and starts threads
        best = float("inf")
        for _ in range(5):
            sync(device)
            start = time.perf_counter()
            work()
            sync(device)
            best = min(best, time.perf_counter() - start)
        return best

    product = seconds(lambda: torch.nn.functional.linear(a, b))
    copy = seconds(lambda: target.copy_(source))
    flops, traffic = 2 * a.numel() * b.shape[0] / product, 2 * source.numel() / copy
    return Rates(_EFFICIENCY * flops, _EFFICIENCY * traffic)


def train_seconds(
    config: Any, rates: Rates, in_sequence: int, as_keys: int, text: int, rows: int, parameter_bytes: int, logits: int
) -> float:
    """One training step: a forward, a backward of twice its work, and AdamW. `in_sequence` audio tokens pass whole
    layers, `as_keys` are keys and values alone; `logits` tokens of a row get logits."""
    head = 2 * config.hidden_size * config.vocab_size * logits
    flops = 3 * rows * (_layers_flops(config, in_sequence, as_keys, text) + head)
    traffic = _ADAMW_PASSES * parameter_bytes + _LOGITS_PASSES * rows * logits * config.vocab_size * 4
    return float(flops / rates.flops + traffic / rates.bytes)


def infer_seconds(
    config: Any,
    rates: Rates,
    in_sequence: int,
    as_keys: int,
    text: int,
    rows: int,
    parameter_bytes: int,
    new_tokens: int,
) -> float:
    """A prefill, whose last position alone gets logits, and `new_tokens` readings of all the weights."""
    flops = rows * _layers_flops(config, in_sequence, as_keys, text)
    return flops / rates.flops + new_tokens * parameter_bytes / rates.bytes


def _layers_flops(config: Any, in_sequence: int, as_keys: int, text: int) -> float:
    """Forward FLOPs of all layers for one row."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_projections = 4 * config.hidden_size * kv_heads * head_dim
    others = 4 * config.hidden_size * heads * head_dim + 6 * config.hidden_size * config.intermediate_size
    tokens = text + in_sequence
    keys_seen = tokens**2 / 2 + tokens * as_keys
    layer = others * tokens + kv_projections * (tokens + as_keys) + 4 * heads * head_dim * keys_seen
    return float(config.num_hidden_layers * layer)
