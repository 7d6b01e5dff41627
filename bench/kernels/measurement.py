"""Measuring one implementation on one case: its results are checked against the truth before it is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palkernels.bench import machine
from palkernels.bench.errors import one_line
from palkernels.bench.instruments import timing
from palkernels.bench.instruments.rates import Rates
from palkernels.bench.kernels.cases import Case
from palkernels.bench.kernels.peers import OURS, Peer, Run

__all__ = [
    "BROKEN",
    "SEED",
    "WRONG",
    "Measurement",
    "call_on",
    "calls_on_sets",
    "measure",
    "our_peer",
    "relative_error",
    "times_ours",
    "works",
]

# ||result - truth|| / ||truth|| that a correct result stays below.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
SEED = 1
WRONG, BROKEN = "wrong", "broke the device"  # how the status of such a row begins


@dataclass(frozen=True)
class Measurement:
    """One implementation on one case. Where it has no samples, `status` says why."""

    case: Case
    name: str
    status: str = "ok"
    error: float | None = None  # the largest of its results' relative errors
    samples: tuple[float, ...] = ()  # seconds
    host_seconds: float | None = None

    def percentile(self, percent: int) -> float:
        """Return a percentile of the samples, in seconds."""
        if len(self.samples) == 1:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=100, method="inclusive")[percent - 1]

    def share_of_limit(self, rates: Rates) -> float:
        """Return the least time that the case takes at these rates, over the median."""
        return self.case.limit(rates) / self.percentile(50)


def our_peer() -> Peer:
    """Return this library's function as a peer. Its implementation is named, so that a kernel which cannot run raises
    and no other one is timed in its place."""

    def prepare(case: Case) -> Run:
        impl = "triton" if case.device.type == "cuda" else "sdpa"
        return lambda inputs: case.ours(inputs, impl)

    return Peer(OURS, OURS, prepare)


def measure(case: Case, checked: Case, truth: list[Tensor], peer: Peer, seconds: float) -> Measurement:
    """Measure one implementation on a case for about `seconds`, if its results on the smaller case `checked` are near
    the truth."""
    if not peer.is_installed:
        return Measurement(case, peer.name, f"not installed: {peer.module}")
    if case.with_gradients and not peer.has_gradients:
        return Measurement(case, peer.name, "computes no gradients")
    try:
        with timing.beside(case.device):
            error = relative_error(checked.with_its_gradients(checked.inputs(SEED), peer.prepare(checked)), truth)
            if not error <= BOUNDS[case.dtype]:  # a NaN is no less wrong
                return Measurement(case, peer.name, f"{WRONG}: error {error:.1g}", error)
            calls = calls_on_sets(case, peer.prepare(case))
            samples = timing.samples(calls, seconds, case.device)
            host = timing.host_seconds(calls[0], case.device)
    except Exception as problem:  # whatever another library raises on a shape that it cannot take
        if peer.key == OURS:
            raise
        if not works(case.device):
            return Measurement(case, peer.name, f"{BROKEN}: {one_line(problem)[:80]}")
        return Measurement(case, peer.name, f"failed: {one_line(problem)[:80]}")
    return Measurement(case, peer.name, "ok", error, tuple(samples), host)


def works(device: torch.device) -> bool:
    """Say whether the device still computes: after an illegal access it never does again in this process."""
    try:
        machine.sync(device)
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except RuntimeError:
        return False


def relative_error(results: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest relative error of the results, in the Frobenius norm; NaN if there is one."""
    pairs = [(x.detach().double(), y.detach()) for x, y in zip(results, truth, strict=True)]
    return float(torch.stack([(x - y).norm() / y.norm() for x, y in pairs]).amax())


def calls_on_sets(case: Case, run: Run) -> list[Callable[[], object]]:
    """Return a call for each of several sets of inputs, which together exceed the caches."""
    first = case.inputs(SEED + 1)
    # Not case.bytes: results may land in the same memory every time, so inputs alone must exceed the cache.
    size = sum(tensor.nbytes for tensor in torch.utils._pytree.tree_leaves(first))
    count = timing.num_buffers(size, case.device)
    sets = [first, *(case.inputs(SEED + 1 + number) for number in range(1, count))]
    return [call_on(case, inputs, run) for inputs in sets]


def call_on(case: Case, inputs: dict[str, Any], run: Run) -> Callable[[], object]:
    """Return a call of the operation on one set of inputs. The forward before a backward pass runs here."""
    if case.op != "backward":
        return lambda: case.with_its_gradients(inputs, run)
    outputs = run(inputs)
    return lambda: case.gradients(outputs, inputs)


def times_ours(row: Measurement, rows: list[Measurement]) -> float | None:
    """Return a row's median over that of this library on the same case; None for this library itself, and without two
    times."""
    ours = next((x for x in rows if x.name == OURS and x.case == row.case), None)
    if ours is None or not ours.samples or not row.samples or row is ours:
        return None
    return row.percentile(50) / ours.percentile(50)
