"""Timing: inputs that no cache holds, samples without the launch in them."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from palkernels.bench import machine
from palkernels.bench.instruments import timing
from palkernels.bench.kernels import measurement
from palkernels.bench.kernels.cases import shape_case

CPU = torch.device("cpu")
SHAPE = "1,4,2,9,20,16"


def test_the_fastest_call_is_the_least_of_those_asked_for(monkeypatch):
    times = iter([9.0, 5.0, 3.0, 4.0])
    monkeypatch.setattr(timing, "wall_seconds", lambda call, device: call() or next(times))
    calls = []
    assert timing.fastest_seconds(lambda: calls.append(0), CPU, calls=3) == 3.0
    assert len(calls) == 1 + 3  # one warms up


def test_a_call_is_timed_between_two_idle_moments(monkeypatch):
    order = []
    monkeypatch.setattr(machine, "sync", lambda device: order.append("idle"))
    timing.wall_seconds(lambda: order.append("call"), CPU)
    assert order == ["idle", "call", "idle"]


def test_buffers_rotate(monkeypatch):
    """As many as exceed the cache four times, and each call reads another one."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**20))
    assert timing.num_buffers(2**19, torch.device("cuda")) == 9
    assert timing.num_buffers(2**30, torch.device("cuda")) == 2
    assert timing.num_buffers(1, torch.device("cuda")) == 32
    case = shape_case("forward", SHAPE, torch.float32, CPU)
    seen = []
    calls = measurement.calls_on_sets(case, lambda inputs: seen.append(inputs["key"].data_ptr()) or [])
    assert len(calls) == 32
    for call in calls:
        call()
    assert len(set(seen)) == 32


def test_a_sample_has_no_launch_in_it(monkeypatch):
    """With a stand-in for a GPU: a replay that finds the queue empty starts 40 ms late, and takes 20 ms."""
    gpu = SimpleNamespace(clock=0.0, idle=True)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.time = gpu.clock

        def elapsed_time(self, later):
            return later.time - self.time

    class Graph:
        def replay(self):
            gpu.clock += 20 + 40 * gpu.idle
            gpu.idle = False

        def reset(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(gpu, "idle", True))
    called = []
    found = timing.samples([lambda: called.append(0), lambda: called.append(1)], 0.0, torch.device("cuda"))
    assert called == [0, 1, 0, 1]  # to warm up, and captured
    assert found == pytest.approx([0.01] * len(found))
    assert len(found) >= timing.MIN_SAMPLES
