"""The host's time of a call: CPU time over short batches of calls, as far as nothing else disturbed them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Batch", "Call", "HostTime", "host_times"]

Call = Callable[[], object]
Batch = Callable[[int], list[Call]]  # makes so many calls to time; what it takes itself is not timed
Key = TypeVar("Key")

BATCH_MICROSECONDS, MOST_CALLS = 1000, 20  # a batch is short, so that it is over before it is disturbed
MIN_ROUNDS, MIN_KEPT = 3, 3
TOLERANCE = 1.12  # of the calibration's time where nothing disturbs it


@dataclass(frozen=True)
class HostTime:
    """Microseconds of a call: the median of the batches that were kept, and their spread."""

    microseconds: float
    p10: float
    p90: float
    batches: int
    undisturbed: bool  # whether enough batches were


@dataclass(frozen=True)
class _Sample:
    microseconds: float
    calibration: float


def host_times(
    batches: Mapping[Key, Batch], seconds: float, wait: Call, progress: Callable[[float], None]
) -> dict[Key, HostTime]:
    """Time calls in turn, for about `seconds` each, and return each one's time.

    Every batch lies between two runs of a fixed loop, the calibration. Other programs slow both, by their use of caches
    and of the same core: a batch is kept where both runs took at most TOLERANCE of the fastest runs, of which the very
    fastest are left out. The time is that of the process, as autograd has a thread of its own for a GPU. `wait` is
    called between batches, so that the host never waits for a queue; `progress` gets the share that is done.
    """
    counts = {key: _calls_of(batch, wait) for key, batch in batches.items()}
    samples: dict[Key, list[_Sample]] = {key: [] for key in batches}
    gc.collect()
    gc.freeze()  # what is there for good: to search it is no part of a call
    start = time.perf_counter()
    done = rounds = 0.0
    while rounds < MIN_ROUNDS or done < 1:
        for key, batch in batches.items():
            first, *calls = batch(1 + counts[key])
            first()  # so that caches hold what it needs, whatever was timed before it
            wait()
            before = _calibrate()
            microseconds = _timed(calls)
            samples[key].append(_Sample(microseconds, max(before, _calibrate())))
            wait()
        rounds += 1
        done = min((time.perf_counter() - start) / (seconds * len(batches)), 1.0)
        progress(done)
    gc.unfreeze()
    calibrations = sorted(sample.calibration for each in samples.values() for sample in each)
    quiet = calibrations[len(calibrations) // 50]
    return {key: _summary(each, TOLERANCE * quiet) for key, each in samples.items()}


def _calls_of(batch: Batch, wait: Call) -> int:
    """Return how many calls a batch has, by the time of two after a first one."""
    first, *calls = batch(3)
    first()
    wait()
    microseconds = _timed(calls)
    wait()
    return int(max(1, min(BATCH_MICROSECONDS // max(microseconds, 1), MOST_CALLS)))


def _timed(calls: list[Call]) -> float:
    """Return the microseconds of a call."""
    begun = time.process_time()
    for call in calls:
        call()
    return 1e6 * (time.process_time() - begun) / len(calls)


def _summary(samples: list[_Sample], bound: float) -> HostTime:
    """Return the time by the samples within the bound; where there are too few, by those nearest to it."""
    kept = [sample for sample in samples if sample.calibration <= bound]
    undisturbed = len(kept) >= MIN_KEPT
    if not undisturbed:
        kept = sorted(samples, key=lambda sample: sample.calibration)[:MIN_KEPT]
    times = [sample.microseconds for sample in kept]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return HostTime(statistics.median(times), deciles[0], deciles[-1], len(times), undisturbed)


def _calibrate() -> float:
    """Return the seconds of the fixed loop, which takes about a tenth of a millisecond."""
    begun = time.thread_time()
    table: dict[int, tuple[int, type]] = {}
    for number in range(1500):
        table[number & 15] = (number, str)
    return time.thread_time() - begun
