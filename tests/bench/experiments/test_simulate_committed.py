"""The committed results of `palkernels simulate`: what LAL saves at full size, and that it still does."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from palkernels.bench.experiments.valueless import ValuelessModel
from palkernels.bench.instruments.rates import GPUS
from palkernels.bench.machine import package_version
from palkernels.bench.methods import DEFAULT_METHODS, LEVERS, METHODS
from palkernels.bench.presets import plan_llm

COMMITTED = Path(__file__).parents[3] / "bench" / "results"


@functools.cache
def llama() -> ValuelessModel:
    return ValuelessModel(plan_llm("llama-3.2-1b", None), torch.bfloat16)


@functools.cache
def committed_llama() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((COMMITTED / "simulate-llama-3.2-1b.json").read_text())
    return document


def committed(name: str, audio_tokens: int) -> dict[str, Any]:
    """The row of a training step on an H200."""
    about = name, "train", audio_tokens, GPUS["h200"].name
    names = ("method", "mode", "audio_tokens", "device")
    (found,) = (row for row in committed_llama()["rows"] if tuple(row[name] for name in names) == about)
    row: dict[str, Any] = found
    return row


def test_training_memory_of_llama_1b() -> None:
    """Batch 8, bfloat16, 128 text tokens, no optimizer: what LAL saves at least. As committed: see below."""
    meta = committed_llama()["meta"]
    conditions = [meta[name] for name in ("train_batch", "text_tokens", "optimizer")]
    assert conditions == [8, 128, "none"]
    plits, tuned, lal = (committed(name, 1500)["peak_memory_bytes"] for name in ("plits", "plits-tuned", "lal"))
    assert lal <= 0.15 * plits
    assert lal <= 0.30 * tuned
    plits, lal = (committed(name, 512)["peak_memory_bytes"] for name in ("plits", "lal"))
    assert lal <= 0.35 * plits


QUICK = ("plits", "lal")


@pytest.mark.parametrize(
    ("name", "audio_tokens"),
    [
        *(
            pytest.param(name, 512, marks=() if name in QUICK else pytest.mark.slow)
            for name in (*DEFAULT_METHODS, *LEVERS)
        ),
        pytest.param("lal", 1500, marks=pytest.mark.slow),
    ],
)
def test_as_committed(name: str, audio_tokens: int) -> None:
    """A change in the model layer or the operators that costs memory or work shows here; where it is meant, the
    results are simulated anew."""
    for package in ("torch", "transformers", "liger-kernel"):
        assert committed_llama()["meta"]["versions"][package] == package_version(package), package
    row, found = committed(name, audio_tokens), llama().train(METHODS[name], audio_tokens, 128, 8)
    assert found.peak_bytes == row["peak_memory_bytes"]
    assert found.peak_above_static_bytes == row["peak_above_static_bytes"]
    assert found.memory_breakdown == row["memory_breakdown"]
    costs = [found.costs[cost] for cost in ("attention_flops", "other_flops", "bytes")]
    assert costs == [row[cost] for cost in ("attention_flops", "other_flops", "traffic_bytes")]


@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b"])
def test_lal_is_linear_in_audio(model: str) -> None:
    """In memory and time, as committed."""
    exponents = json.loads((COMMITTED / f"simulate-{model}.json").read_text())["exponents"]
    found = [x for x in exponents if (x["varies"], x["mode"], x["method"]) == ("audio_tokens", "train", "lal")]
    assert len(found) == 3 * len(GPUS)
    for entry in found:
        assert entry["exponent"] == pytest.approx(1.0, abs=0.1), entry
