"""The host's time of a call: what counts, and what is left out. On clocks that the tests turn."""

import itertools

import pytest

from palkernels.bench.instruments import host_time
from palkernels.bench.instruments.host_time import host_times


@pytest.fixture
def machine(monkeypatch):
    """A machine on which each calibration and each batch take what the next entries say."""
    state = {"calibrations": itertools.repeat(1.0), "microseconds": itertools.repeat(100.0), "clock": 0.0}

    def clock():
        state["clock"] += 1.0
        return state["clock"]

    monkeypatch.setattr(host_time, "_calibrate", lambda: next(state["calibrations"]))
    monkeypatch.setattr(host_time, "_timed", lambda calls: [call() for call in calls] and next(state["microseconds"]))
    monkeypatch.setattr(host_time.time, "perf_counter", clock)
    return state


def run(batch, rounds, wait=lambda: None):
    done = []
    (time,) = host_times({"row": batch}, float(rounds), wait, done.append).values()
    assert len(done) == rounds
    assert done[-1] == 1.0
    return time


def test_disturbed_batches_are_left_out(machine):
    """Two calibrations a batch: a batch counts where neither was slow."""
    machine["calibrations"] = iter([1.0, 1.0, 1.3, 1.0, 1.0, 1.1, 1.0, 1.3, 1.0, 1.0])
    machine["microseconds"] = iter([100.0, 10.0, 90.0, 30.0, 90.0, 20.0])  # the first one says how many calls fit
    time = run(lambda count: [lambda: None] * count, 5)
    assert (time.microseconds, time.batches, time.undisturbed) == (20.0, 3, True)
    assert 10 <= time.p10 < 20 < time.p90 <= 30


def test_too_few_undisturbed_batches_are_told(machine):
    machine["calibrations"] = iter([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    machine["microseconds"] = iter([100.0, 10.0, 20.0, 30.0, 90.0])
    time = run(lambda count: [lambda: None] * count, 4)
    assert (time.microseconds, time.batches, time.undisturbed) == (20.0, 3, False)


@pytest.mark.parametrize(("microseconds", "calls"), [(5000.0, 1), (100.0, 10), (1.0, 20)])
def test_a_batch_is_short(machine, microseconds, calls):
    machine["microseconds"] = itertools.repeat(microseconds)
    counts = []
    run(lambda count: counts.append(count) or [lambda: None] * count, 3)
    assert counts == [3, *[1 + calls] * 3]  # one before them fills the caches


def test_the_queue_is_empty_where_a_batch_begins_and_after_it(machine):
    events = []
    machine["calibrations"] = iter(lambda: events.append("calibrate") or 1.0, None)
    machine["microseconds"] = itertools.repeat(500.0)
    run(lambda count: [lambda: events.append("call")] * count, 3, lambda: events.append("wait"))
    assert events[:5] == ["call", "wait", "call", "call", "wait"]
    assert events[5:] == ["call", "wait", "calibrate", "call", "call", "calibrate", "wait"] * 3
