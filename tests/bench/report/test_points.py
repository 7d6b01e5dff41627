"""Gains between methods at the same point, and the steps from PLITS to LAL."""

import pytest
from support import documents

from palkernels.bench.report.points import (
    EAGER_RATE,
    EAGER_SECONDS,
    MEMORY,
    RATE,
    SECONDS,
    Points,
    add_errors,
    relative,
    value,
    waterfall,
)


def test_gains_over_a_baseline() -> None:
    document = documents.measured()
    points = Points(document["rows"])
    assert points.row("train", "plits", 512) == document["rows"][0]
    faster = points.change(RATE, "train", "lal", "plits", 512)
    assert faster is not None
    assert 1 + faster == 3.0
    assert points.change(MEMORY, "train", "lal", "plits", 512) == -0.25
    for key in (MEMORY, RATE):
        assert points.change(key, "train", "plits", "plits", 512) is None  # the baseline itself
        assert points.change(key, "train", "lal", "plits", 1500) is None  # the baseline did not fit
        assert points.change(key, "train", "lal", "plits", 77) is None  # nobody was there
    assert relative(1.0, 0.0) is None


def test_what_was_measured_ran_eagerly() -> None:
    row = documents.row("lal", "train", 512, 6.0, 3.0, 0.5)
    assert value(row, EAGER_RATE) == 6.0
    predicted = row | {"source": "simulated"}
    assert value(predicted, EAGER_RATE) is None
    predicted |= {"eager_samples_per_second": 4.0}
    assert (value(predicted, RATE), value(predicted, EAGER_RATE)) == (6.0, 4.0)
    assert value(predicted, EAGER_SECONDS) == 0.5
    predicted["device"] = "GPU"
    add_errors([predicted], {"meta": {"device_name": "GPU"}, "rows": [row | {"samples_per_second": {"p50": 5.0}}]})
    errors = {"peak_memory_bytes": 0.0, "samples_per_second": 0.2, "eager_samples_per_second": -0.2}
    assert predicted["error_against_measured"] == pytest.approx(errors)


def test_a_rate_of_zero_takes_no_time() -> None:
    row = documents.row("lal", "train", 512, 0.0, 1.0, 0.5)
    assert value(row, RATE) == 0.0
    assert value(row, SECONDS) is None


def test_steps_sum_to_the_whole() -> None:
    values = {"plits": 10.0, "plits-pooled": 1.0, "plits-tuned": 8.0, "lal-eager": 9.0, "lal": 3.0}
    steps = waterfall(values)
    assert [step.end for step in steps] == ["plits-tuned", "lal-eager", "lal"]
    assert sum(step.saved or 0 for step in steps) == 7.0
    assert sum(step.share or 0 for step in steps) == pytest.approx(1.0)
    assert steps[1].saved == -1.0  # a step may cost
    del values["lal-eager"]
    steps = waterfall(values)
    assert [(step.end, step.saved) for step in steps] == [("plits-tuned", 2.0), ("lal", 5.0)]
    assert "the integration" in steps[1].what
    assert "our kernels" in steps[1].what
    assert waterfall({"plits": 1.0, "lal-eager": 2.0}) == []
    assert [step.share for step in waterfall({"plits": None, "lal": 2.0})] == [None]


def test_errors_against_a_measured_run() -> None:
    row = {
        "method": "lal", "mode": "train", "audio_tokens": 4, "text_tokens": 2, "batch_size": 1, "dtype": "bfloat16",
        "status": "ok", "peak_memory_bytes": 100, "samples_per_second": {"p50": 2.0},
    }  # fmt: skip
    simulated = [{**row, "device": "NVIDIA H200", "peak_memory_bytes": 103}, {**row, "device": "NVIDIA A100"}]
    found = add_errors(
        simulated, {"meta": {"device_name": "NVIDIA H200"}, "rows": [{**row, "samples_per_second": {"p50": 1.6}}]}
    )
    assert found == 1
    assert simulated[0]["error_against_measured"]["peak_memory_bytes"] == pytest.approx(0.03)
    assert simulated[0]["error_against_measured"]["samples_per_second"] == pytest.approx(0.25)
    assert "error_against_measured" not in simulated[1]
