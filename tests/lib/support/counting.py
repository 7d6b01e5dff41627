"""Counts what a piece of code asks of host and device: functions it calls, operators it runs, values it waits for."""

import gc
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READING = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::allclose"}
SHAPED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim"}
READING_METHODS = ("tolist", "cpu", "numpy")  # on a CPU they run no operator


class Operators(TorchDispatchMode):
    """Counts operators by name. What runs inside an operator of ours is not seen, as on a GPU."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.masked_selections = 0  # tensor[mask], whose size depends on the mask

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().split(".")[0]
        self.calls[name] += 1
        if name == "aten::index":
            self.masked_selections += any(index is not None and index.dtype == torch.bool for index in args[1])
        return operator(*args, **(kwargs or {}))

    def waits(self):
        """How many of them would wait for a GPU."""
        return self.masked_selections + sum(self.calls[name] for name in READING | SHAPED_BY_VALUES)


def count_operators(run):
    """The number of operators that ``run()`` calls."""
    with Operators() as counted:
        run()
    return counted.calls.total()


def count_calls(run):
    """The number of functions in Python, and in C, that ``run()`` calls."""
    calls, outer = Counter(), sys.getprofile()

    def note(frame, event, argument):
        calls[event] += 1

    gc.disable()  # else what earlier tests left is finalized within, now and then
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(outer)
        gc.enable()
    return calls["call"], calls["c_call"]


def count_reads(run, monkeypatch):
    """How often ``run()`` would wait for a GPU: reads of values, and operators whose results' sizes depend on them."""
    reads = Counter()

    def counting(name):
        method = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            reads[name] += 1
            return method(tensor, *args, **kwargs)

        return read

    with monkeypatch.context() as patches, Operators() as counted:
        for name in READING_METHODS:
            patches.setattr(torch.Tensor, name, counting(name))
        run()
    return reads.total() + counted.waits()
