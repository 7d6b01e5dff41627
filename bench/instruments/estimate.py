"""How long a run will take, from the work to do and this machine's rates.

An estimate to plan a coffee by, not a result: it counts matrix products, the traffic of activations, logits and
optimizer, and the weights that decoding reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from palkernels.bench.instruments.rates import Rates
from palkernels.model.causal_lm.layers import head_dim_of

__all__ = ["Sample", "host_seconds", "infer_seconds", "train_seconds"]

# The share of the machine's rates that whole steps reach on CPU cores: about half with smollm2-135m, 0.57 to 0.69 with
# two layers of llama-3.2-1b.
EFFICIENCY = 0.5
# What Python takes for one layer in eager mode on a GPU's host, in seconds: a decoding step and a training step of
# llama-3.2-1b beside an H200 (bench/LOG.md).
HOST_SECONDS = {"infer": 0.9e-3, "train": 5e-3}
# How often the logits are read or written, in float32: cast, softmax, loss and their gradients.
LOGITS_PASSES = 8
# How often AdamW passes over the weights: it reads weight, gradient and moments, and writes weight and moments.
ADAMW_PASSES = 7


@dataclass(frozen=True)
class Sample:
    """The tokens of one text and its audio, and how many such samples a batch has."""

    in_sequence: int  # audio tokens that pass whole layers
    as_keys: int  # audio tokens that are keys and values alone
    text: int
    batch: int


def train_seconds(config: Any, rates: Rates, sample: Sample, logits: int, parameter_bytes: int) -> float:
    """Return the seconds of one training step: a forward, a backward of twice its work, and AdamW. `logits` tokens of a
    sample get logits."""
    head = 2 * config.hidden_size * config.vocab_size * logits
    flops = 3 * sample.batch * (_layers_flops(config, sample) + head)
    traffic = ADAMW_PASSES * parameter_bytes + LOGITS_PASSES * sample.batch * logits * config.vocab_size * 4
    return _seconds(flops, traffic, rates)


def infer_seconds(config: Any, rates: Rates, sample: Sample, new_tokens: int, parameter_bytes: int) -> float:
    """Return the seconds of a prefill, whose last position alone gets logits, and of `new_tokens` readings of all the
    weights."""
    flops = sample.batch * _layers_flops(config, sample)
    return _seconds(flops, new_tokens * parameter_bytes, rates)


def host_seconds(config: Any, mode: str, new_tokens: int) -> float:
    """Return the least seconds of one pass on a GPU's host, which launches every operation by itself: a training step
    ("train"), or `new_tokens` steps of a generation ("infer")."""
    steps = new_tokens if mode == "infer" else 1
    return float(config.num_hidden_layers * steps * HOST_SECONDS[mode])


def _seconds(flops: float, traffic: float, rates: Rates) -> float:
    """Return the sum of both times: neither dominates a whole step."""
    return float(flops / rates.flops_per_second + traffic / rates.bytes_per_second) / EFFICIENCY


def _layers_flops(config: Any, sample: Sample) -> float:
    """Return the FLOPs of one sample's forward through all layers."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = head_dim_of(config)
    kv_projections = 4 * config.hidden_size * kv_heads * head_dim
    others = 4 * config.hidden_size * heads * head_dim + 6 * config.hidden_size * config.intermediate_size
    tokens = sample.text + sample.in_sequence
    pairs = tokens**2 / 2 + tokens * sample.as_keys  # of a query and a key that it sees
    layer = others * tokens + kv_projections * (tokens + sample.as_keys) + 4 * heads * head_dim * pairs
    return float(config.num_hidden_layers * layer)
