"""What devices do per second."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from palkernels.bench.instruments.rates import GPUS, HOST, Host, Rates, measure_rates

RESULTS = Path(__file__).parents[3] / "bench" / "results"


def test_an_operation_takes_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    rates = Rates(flops_per_second=10.0, bytes_per_second=2.0)
    assert rates.seconds(30.0, 4.0) == 3.0
    assert rates.seconds(30.0, 8.0) == 4.0


def test_shares_of_a_gpu_are_within_reach() -> None:
    for gpu in GPUS.values():
        assert gpu.within_reach == Rates(0.8 * gpu.published.flops_per_second, 0.9 * gpu.published.bytes_per_second)


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_a_launch_takes_what_measured_runs_took() -> None:
    """Stock code that waited for its host, over its launches; and the calls of our operators, over theirs."""
    point = {"method": "lal-eager", "audio_tokens": 1500}
    measured, simulated = (
        {row["mode"]: row for row in result(name)["rows"] if point.items() <= row.items()}
        for name in ("figure1-h200", "simulate-llama-3.2-1b")
    )
    for mode, seconds in (("infer", HOST.generating), ("train", HOST.training)):
        row = measured[mode]
        assert seconds == pytest.approx(
            row["batch_size"] / row["samples_per_second"]["p50"] / simulated[mode]["kernels"], rel=0.01
        )
    kernels = {"forward": 1, "decode": 1, "backward": 2}
    ours = [
        row["extra_info"]["host_seconds"] / kernels[row["params"]["op"]]
        for name in ("microbench-h200", "microbench-h200-again")
        for row in result(name)["benchmarks"]
        if row["name"] == "palkernels" and row["params"]["op"] in kernels
    ]
    assert len(ours) == 18
    assert HOST.ours == pytest.approx(statistics.median(ours), rel=0.01)


def test_launches_are_added() -> None:
    host = Host(generating=1.0, training=2.0, ours=10.0)
    assert host.seconds(7, 3, training=False) == 4 * 1.0 + 3 * 10.0
    assert host.seconds(7, 3, training=True) == 4 * 2.0 + 3 * 10.0


def test_this_machine_is_measured() -> None:
    rates = measure_rates(torch.float32, torch.device("cpu"), seconds=0.0)
    assert rates.flops_per_second > 0
    assert rates.bytes_per_second > 0
