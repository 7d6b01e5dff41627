"""Scenarios of launches that are repeated, on the stand-in for a GPU: what they have in common.

To be imported first of all, by a script that :func:`main` runs: the stand-in changes torch.
"""

from palkernels.bench.instruments import stand_in

stand_in.enter()

import contextlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from palkernels import lal_attention, plans  # noqa: E402

SCENARIOS = {}
LONG = []  # the launches that Triton bound
HQ, HKV, D = 4, 2, 64
_run = JITFunction.run


def run_and_count(self, *args, **kwargs):
    LONG.append(self)
    return _run(self, *args, **kwargs)


JITFunction.run = run_and_count


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def tensors(queries=1, keys=16, audio=20, batch=2, grad=False, dtype=torch.bfloat16):
    shapes = [(batch, queries, HQ, D), *[(batch, keys, HKV, D)] * 2, *[(batch, audio, HKV, D)] * 2]
    made = [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_(grad) for x in made]


def options(batch=2):
    return {"audio_lengths": torch.full((batch,), 5), "text_start": torch.zeros(batch, dtype=torch.int32)}


def long_launches(call):
    """How many of a call's launches took the long way."""
    before = len(LONG)
    call()
    return len(LONG) - before


def launched(call):
    before = stand_in.launches()
    call()
    return stand_in.launched(before)


@contextlib.contextmanager
def the_long_way(count=1):
    """Within the context launches take the long way, which ``count`` of them must do."""
    before, stand_in.capturing = len(LONG), True
    try:
        yield
    finally:
        stand_in.capturing = False
    assert len(LONG) == before + count, "the long way was not taken"


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def same(launches, others, given):
    """Two lists of launches are the same but for pointers to memory that calls allocate; ``given`` are known."""
    assert [x.kernel for x in launches] == [x.kernel for x in others]
    for got, want in zip(launches, others, strict=True):
        assert got.grid == want.grid, (got.grid, want.grid)
        assert len(got.parameters) == len(want.parameters)
        for a, b in zip(got.parameters, want.parameters, strict=True):
            is_pointer = min(a, b) > 2**40  # the addresses of a process; no number is as large
            assert a == b or (is_pointer and a not in given and b not in given), (a, b)


def check_repeats(make, call, count):
    """The second call of a geometry launches what the long way does, without Triton's binder."""
    call(make())
    given = make()
    leaves = [x.data_ptr() for x in given if x is not None]
    before = len(LONG)
    repeated = launched(lambda: call(given))
    assert len(LONG) == before, "a repetition took the long way"
    assert len(repeated) == count
    with the_long_way(count):
        slow = launched(lambda: call(given))
    same(repeated, slow, leaves)
    pointers = {x for launch in repeated for x in launch.parameters}
    assert pointers.issuperset(leaves)


def pointers_beyond(launch, known):
    """The pointers to what calls keep: not to tensors given, nor to the two outputs, which lie before them."""
    addresses = [x for x in launch.parameters if x > 2**40 and x not in {t.data_ptr() for t in known}]
    kept = set(addresses[2:6])
    assert len(kept) == 4
    return kept


def backward(x, which=slice(None), with_lse=False):
    out, lse = lal_attention(*x, return_lse=True)
    results = (out, lse) if with_lse else (out,)
    gradients = [torch.ones(2, 16, HQ, D, dtype=torch.bfloat16).transpose(1, 2), torch.ones(2, HQ, 16)]
    torch.autograd.grad(results, x[which], gradients[: len(results)])


def must_raise(error, message, call):
    with pytest.raises(error, match=re.escape(message)):
        call()


def main():
    """Run the scenarios that the command line names, or all, and print as JSON what each came to."""
    torch.set_num_threads(1)
    names, outcomes = sys.argv[1:], {}
    for name, function in SCENARIOS.items():
        if names and name not in names:
            continue
        plans.forget_all()
        try:
            function()
            outcomes[name] = "holds"
        except (Exception, pytest.fail.Exception):
            outcomes[name] = traceback.format_exc()
        stand_in.stream, stand_in.device, stand_in.capturing = 0, 0, False
    print(json.dumps(outcomes))
