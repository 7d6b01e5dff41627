"""Attention by launches that are ready, from an earlier call that looked alike."""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palkernels import devices
from palkernels.arguments import Call
from palkernels.kernels import decode, scratch, tiles
from palkernels.kernels.division import Division
from palkernels.kernels.launch import Launch
from palkernels.kernels.operands import Matrix
from palkernels.kernels.ready import ReadyLaunch, ready, repeat, repeatable
from palkernels.plans import ALIGNMENT

FLOAT_BYTES = 4


class ForwardPlan(NamedTuple):
    """A launch of the forward kernel or the decoding kernel, and the outputs that it fills."""

    launch: ReadyLaunch
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    lse_shape: tuple[int, ...]
    device: torch.device
    device_index: int
    division: Division | None  # the decoding kernel's
    scratch: tuple[int, ...]  # its floats; where row_max and row_sum begin among them, in bytes; its counters
    numbers: tuple[Any, ...]  # the prepared call's

    def run(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor] | None:
        """Output and LSE; None, and nothing is launched, where this launch must not be repeated for these tensors."""
        device, index = self.device, self.device_index
        if not repeatable(index, (self.launch,)):
            return None
        out = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        lse = torch.empty(self.lse_shape, dtype=torch.float32, device=device)
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        pointers += (out.data_ptr(), lse.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(index)
        if self.scratch:
            num_floats, row_max, row_sum, num_counters = self.scratch
            floats, counters = scratch.kept(device, stream, num_floats, num_counters)
            acc = floats.data_ptr()
            pointers += (acc, acc + row_max, acc + row_sum, counters.data_ptr())
        if reduce(operator.or_, pointers) % ALIGNMENT:
            return None
        self.launch.run(stream, pointers)
        return out, lse

    def grown(self, tensors: Sequence[Tensor | None]) -> "ForwardPlan":
        """The plan for text keys of another number, and of strides of the same classes."""
        key, value = tensors[1:3]
        assert key is not None
        num_keys = key.shape[2]
        numbers: dict[str, Any] = {"key": Matrix.of(key)[1:], "value": Matrix.of(value)[1:], "num_keys": num_keys}
        if self.division is None:
            return self._replace(launch=self.launch.with_numbers(self.launch.num_programs, numbers))
        division = self.division._replace(num_keys=num_keys)
        shares = division.shares()
        numbers["audio_shares"], numbers["text_shares"] = shares
        launch = self.launch.with_numbers(division.num_programs(shares), numbers)
        return self._replace(launch=launch, division=division, scratch=_scratch_of(division, shares))


class BackwardPlan(NamedTuple):
    """The launches of a backward pass, each of which may read what the ones before it have written."""

    launches: tuple[ReadyLaunch, ...]
    needed: tuple[bool, ...]
    num_statistics: int

    def run(self, operands: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The needed gradients, in order; None, and nothing is launched, as in :meth:`ForwardPlan.run`.

        ``operands`` are the call's tensors, the output, its LSE, and the gradients of both.
        """
        lse: Any = operands[-3]
        gradients = [
            torch.empty_like(x) if need and x is not None else None
            for need, x in zip(self.needed, operands, strict=False)
        ]
        # In a name, so that it lives until everything is launched.
        statistics = torch.empty(self.num_statistics, dtype=lse.dtype, device=lse.device)
        if not repeat(self.launches, (*operands, statistics, *gradients), lse.device):
            return None
        return [gradient for gradient in gradients if gradient is not None]


def forward_plan(
    tensors: Sequence[Tensor | None], call: Call, launch: Launch, compiled: Any, out: Tensor, lse: Tensor
) -> ForwardPlan | None:
    """The plan of a call that has run, if it can be repeated. ``tensors`` are the caller's."""
    is_decode = launch.kernel is decode.decode_kernel
    parts = launch.arguments[launch.kernel.arg_names.index("parts")] if is_decode else ()
    operands = (*tensors, out, lse, *parts)
    repeated = _ready([launch], [compiled], operands)
    if repeated is None:
        return None
    division = decode.division_of(call, tiles.capability(call.query.device)) if is_decode else None
    return ForwardPlan(
        launch=repeated[0],
        shape=tuple(out.shape),
        strides=out.stride(),
        dtype=out.dtype,
        lse_shape=tuple(lse.shape),
        device=out.device,
        device_index=devices.index(out.device),
        division=division,
        scratch=() if division is None else _scratch_of(division, division.shares()),
        numbers=call.numbers(),
    )


def backward_plan(
    operands: Sequence[Tensor | None], needed: Sequence[bool], launches: Sequence[Launch], compiled: Sequence[Any]
) -> BackwardPlan | None:
    """The plan of a backward pass that has run, if it can be repeated.

    ``operands`` are the call's tensors, the output, its LSE, the gradients of both, the statistics of its rows, and the
    gradients of the five float tensors.
    """
    repeated = _ready(launches, compiled, operands)
    statistics: Any = operands[-1 - len(needed)]
    return None if repeated is None else BackwardPlan(repeated, tuple(needed), statistics.numel())


def _ready(
    launches: Sequence[Launch], compiled: Sequence[Any], operands: Sequence[Tensor | None]
) -> tuple[ReadyLaunch, ...] | None:
    repeated = [ready(launch, kernel, operands) for launch, kernel in zip(launches, compiled, strict=True)]
    return None if None in repeated else tuple(repeated)  # type: ignore[arg-type]


def _scratch_of(division: Division, shares: tuple[int, int]) -> tuple[int, ...]:
    _, row_max, row_sum, end = division.places(shares)
    return end, row_max * FLOAT_BYTES, row_sum * FLOAT_BYTES, division.num_counters()
