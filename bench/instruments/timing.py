"""All that times: one call between two idle moments of the device, the fastest of many, and samples for statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from palkernels.bench import machine

__all__ = ["beside", "fastest_seconds", "host_seconds", "num_buffers", "samples", "wall_seconds"]

Call = Callable[[], object]
MIN_SAMPLES, MAX_SAMPLES = 3, 200
BURST = 5  # replays that the host issues without waiting


def wall_seconds(call: Call, device: torch.device) -> float:
    """Return the seconds of one call by the host's clock, from an idle device to an idle device."""
    machine.sync(device)
    start = time.perf_counter()
    call()
    machine.sync(device)
    return time.perf_counter() - start


def fastest_seconds(call: Call, device: torch.device, *, calls: int = 1, seconds: float = 0.0) -> float:
    """Call once to warm up, then at least `calls` times and for at least `seconds`, and return the seconds of the
    fastest call. On CUDA they are the device's, without the host's launch."""
    once = _device_seconds if device.type == "cuda" else wall_seconds
    call()
    end = time.perf_counter() + seconds
    fastest = min(once(call, device) for _ in range(calls))
    while time.perf_counter() < end:
        fastest = min(fastest, once(call, device))
    return fastest


def host_seconds(call: Call, device: torch.device, repeats: int = 20) -> float:
    """Return what a call takes of the host's time, in seconds, when it launches kernels one by one; on a CPU, the call
    itself."""
    call()
    machine.sync(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = (time.perf_counter() - start) / repeats  # before the device has caught up
    machine.sync(device)
    return spent


def samples(calls: list[Call], seconds: float, device: torch.device) -> list[float]:
    """Return samples of the seconds per call, each the mean of one round over all `calls`.

    On CUDA a round is a CUDA graph, replayed right after another one, so that the host's launch time, which may exceed
    the kernels', is not in it. Both this function and whatever makes the calls must run within :func:`beside`.
    """

    def one_round() -> None:
        for call in calls:
            call()

    one_round()  # some make on their first call what they keep
    if device.type == "cuda":
        return [spent / len(calls) for spent in _graph_samples(one_round, seconds, device)]
    rounds: list[float] = []
    end = time.perf_counter() + seconds
    while len(rounds) < MIN_SAMPLES or (time.perf_counter() < end and len(rounds) < MAX_SAMPLES):
        rounds.append(wall_seconds(one_round, device))
    return [spent / len(calls) for spent in rounds]


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """On CUDA, make a new stream the current one: a CUDA graph cannot be captured on the default stream. On a CPU do
    nothing."""
    if device.type != "cuda":
        yield
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # whose results are read in here
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        machine.sync(device)


def num_buffers(bytes_each: float, device: torch.device) -> int:
    """Return how many sets of inputs to rotate so that none is left in a cache: four times the cache, 2 to 32 sets."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 * 2**20
    return int(min(max(4 * cache // max(bytes_each, 1) + 1, 2), 32))


def _device_seconds(call: Call, device: torch.device) -> float:
    """Return the seconds between two events around one call."""
    before, after = _event(), _event()
    before.record()
    call()
    after.record()
    machine.sync(device)
    return float(before.elapsed_time(after) * 1e-3)


def _graph_samples(one_round: Call, seconds: float, device: torch.device) -> list[float]:
    """Return the seconds of replays of a CUDA graph of one round."""
    stream = torch.cuda.current_stream(device)
    machine.sync(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        one_round()
    rounds: list[float] = []
    warm = time.perf_counter() + seconds / 4  # clocks rise under load
    end = warm + seconds
    while len(rounds) < MIN_SAMPLES or (time.perf_counter() < end and len(rounds) < MAX_SAMPLES):
        events = [_event() for _ in range(BURST)]
        for event in events:
            graph.replay()
            event.record(stream)
        machine.sync(device)
        if time.perf_counter() >= warm:
            # The first event follows the first replay, for which an idle GPU waits while the host launches it.
            rounds += [before.elapsed_time(after) * 1e-3 for before, after in pairwise(events)]
    graph.reset()
    return rounds


def _event() -> Any:
    event: Any = torch.cuda.Event  # its constructor has no types
    return event(enable_timing=True)
