"""What devices do per second: GPUs by their data sheets, this machine by a large product and a large copy. And what a
GPU's host takes for a launch, by measured runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from palkernels.bench.instruments.timing import fastest_seconds

__all__ = ["GPUS", "HOST", "Gpu", "Host", "Rates", "measure_rates"]


@dataclass(frozen=True)
class Rates:
    """Arithmetic and memory traffic (read and written) of a device per second."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, traffic: float) -> float:
        """Return the least time of one operation, whose arithmetic and traffic overlap."""
        return max(flops / self.flops_per_second, traffic / self.bytes_per_second)


@dataclass(frozen=True)
class Gpu:
    """A GPU's published rates, of which the given shares are within reach."""

    name: str
    published: Rates  # of 16-bit matrix products

    # An H200 reached 790 TFLOP/s and 4.3 TB/s with one large product and one large copy (bench/LOG.md).
    SHARE_OF_FLOPS: ClassVar[float] = 0.8
    SHARE_OF_BYTES: ClassVar[float] = 0.9

    @cached_property
    def within_reach(self) -> Rates:
        return Rates(
            self.SHARE_OF_FLOPS * self.published.flops_per_second, self.SHARE_OF_BYTES * self.published.bytes_per_second
        )


# NVIDIA's data sheets, without sparsity.
GPUS = {
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", Rates(312e12, 2.039e12)),
    "h200": Gpu("NVIDIA H200", Rates(989e12, 4.8e12)),
}


@dataclass(frozen=True)
class Host:
    """What a GPU's host takes to launch a kernel in eager mode, in seconds, with the Python around it."""

    generating: float  # a kernel of PyTorch in a generation
    training: float  # a kernel of PyTorch in a training step: autograd and AdamW have their part in it
    ours: float  # a kernel of this library

    def seconds(self, kernels: float, ours: float, *, training: bool) -> float:
        """Return the time of launching `kernels`, of which `ours` are this library's, one after the other."""
        return (kernels - ours) * (self.training if training else self.generating) + ours * self.ours


# One H200's host, 2026-11 (bench/results). Code of PyTorch's kernels alone that waits for its host there, LAL, eager
# with 1,500 audio tokens, took 369 ms to generate and 96 ms to train with (figure1-h200.json): that over its launches
# as they are counted now (simulate-llama-3.2-1b.json). Ours: the median of what forward, backward and decoding took
# (microbench-h200.json, microbench-h200-again.json), of backward half, which launches two kernels. That was before
# calls repeated their launches.
HOST = Host(generating=16.6e-6, training=32.7e-6, ours=321e-6)


@torch.no_grad()
def measure_rates(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> Rates:
    """Return what this machine reaches at best, on random data: the rate of a large matrix product in a dtype, and that
    of a large copy. Takes about twice `seconds`."""
    on_gpu = device.type == "cuda"
    size, elements = (8192, 2**30) if on_gpu else (1024, 2**24)
    matrix = torch.randn(size, size, dtype=dtype, device=device)
    product = fastest_seconds(lambda: matrix @ matrix, device, seconds=seconds)
    source = torch.randn(elements, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    copy = min(fastest_seconds(call, device, seconds=seconds / 2) for call in copies)
    return Rates(2 * size**3 / product, 2 * source.nbytes / copy)
