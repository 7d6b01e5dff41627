"""Times of short calls, and the rates that the machine reaches at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from palkernels.bench import machine

__all__ = ["Ceilings", "beside", "ceilings", "host_seconds", "num_buffers", "samples"]

Calls = list[Callable[[], object]]
Ceilings = dict[str, float]  # flops_per_second, bytes_per_second
MIN_SAMPLES, MAX_SAMPLES = 3, 200
BURST = 5  # replays that the host issues without waiting


def num_buffers(bytes_each: float, device: torch.device) -> int:
    """How many sets of inputs to rotate so that none is left in a cache: four times the cache, 2 to 32 sets."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 * 2**20
    return int(min(max(4 * cache // max(bytes_each, 1) + 1, 2), 32))


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """A stream of its own, which is what a CUDA graph can be captured on; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # whose results are read in here
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        machine.sync(device)


def samples(calls: Calls, seconds: float, device: torch.device) -> list[float]:
    """Seconds per call, each the mean of one round over all ``calls``.

    On CUDA a round is a CUDA graph, replayed right after another one, so that the host's launch time, which may exceed
    the kernels', is not in it. To be called within :func:`beside`, as whatever made the calls.
    """
    for call in calls[:2]:
        call()
    if device.type == "cuda":
        return _graph_samples(calls, seconds, device)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < MIN_SAMPLES or (time.perf_counter() < end and len(found) < MAX_SAMPLES):
        start = time.perf_counter()
        for call in calls:
            call()
        found.append((time.perf_counter() - start) / len(calls))
    return found


def _graph_samples(calls: Calls, seconds: float, device: torch.device) -> list[float]:
    stream = torch.cuda.current_stream(device)
    machine.sync(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    found: list[float] = []
    warm = time.perf_counter() + seconds / 4  # clocks rise under load
    end = warm + seconds
    while len(found) < MIN_SAMPLES or (time.perf_counter() < end and len(found) < MAX_SAMPLES):
        marks = [_event() for _ in range(BURST)]
        for mark in marks:
            graph.replay()
            mark.record(stream)
        machine.sync(device)
        if time.perf_counter() >= warm:
            # The first mark follows the first replay, for which an idle GPU waits while the host launches it.
            found += [first.elapsed_time(last) * 1e-3 / len(calls) for first, last in pairwise(marks)]
    graph.reset()
    return found


def _event() -> Any:
    """Before or after what is timed."""
    event: Any = torch.cuda.Event
    return event(enable_timing=True)


def host_seconds(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """What a call takes of the host's time when it launches kernels one by one; on a CPU, the call itself."""
    call()
    machine.sync(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = (time.perf_counter() - start) / repeats
    machine.sync(device)
    return spent


def ceilings(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> Ceilings:
    """Rates of a large matrix product and of a large copy, bytes read plus bytes written, on random data."""
    on_gpu = device.type == "cuda"
    size, elements = (8192, 2**30) if on_gpu else (1024, 2**24)
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    flops = 2 * size**3 / _fastest(lambda: matrix @ matrix, seconds, device)
    source = torch.randn(elements, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    target = torch.empty_like(source)
    copies: list[Callable[[], Tensor]] = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    fastest = min(_fastest(copy, seconds / 2, device) for copy in copies)
    return {"flops_per_second": flops, "bytes_per_second": 2 * source.nbytes / fastest}


def _fastest(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds of the fastest of many calls: the machine at its best."""
    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        if device.type == "cuda":
            first, last = _event(), _event()
            first.record()
            call()
            last.record()
            machine.sync(device)
            best = min(best, first.elapsed_time(last) * 1e-3)
        else:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return best
