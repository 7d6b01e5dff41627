"""What else no launch is repeated for, and what a geometry tells apart. Run as a script; see support.planned."""

import torch
from triton import knobs

from palkernels import audio_kv, plans
from palkernels.attention.plans import _classes
from palkernels.kernels import scratch
from palkernels.kernels.ready import ReadyLaunch, repeatable
from support.planned import (
    HKV,
    LONG,
    D,
    backward,
    lal_attention,
    launched,
    long_launches,
    main,
    must_raise,
    pointers_beyond,
    scenario,
    stand_in,
    tensors,
)  # fmt: skip  # isort: skip


def projected(grad=False):
    shapes = [(2, 20, 64), (64,), (HKV * D, 64), (HKV * D, 64)]
    given = [torch.randn(shape).to(torch.bfloat16).requires_grad_(grad) for shape in shapes]
    return lambda: audio_kv(*given, num_kv_heads=HKV, eps=1e-5)


@scenario
def traces_see_the_operator():
    x = tensors(16)
    for _ in range(2):
        lal_attention(*x)
        traced = torch.jit.trace(lambda query: lal_attention(query, *x[1:]), (x[0],), check_trace=False)
        assert "palkernels::lal_forward" in str(traced.graph)


@scenario
def decoding_goes_on_after_a_launch_that_failed():
    """Whether refused or interrupted on the host: the next one finds the same memory, and its counters are zeros."""
    x = tensors()
    lal_attention(*x)
    (before,) = launched(lambda: lal_attention(*x))
    run = ReadyLaunch.run
    for error in (KeyboardInterrupt, RuntimeError):

        def fail(*_, error=error):
            raise error("on the host")

        ReadyLaunch.run = fail
        try:
            must_raise(error, "on the host", lambda: lal_attention(*x))
        finally:
            ReadyLaunch.run = run
        (after,) = launched(lambda: lal_attention(*x))
        assert pointers_beyond(after, x) == pointers_beyond(before, x)
    assert scratch._kept
    assert not any(counters.any() for _, counters in scratch._kept.values())


@scenario
def tensors_without_memory_get_some():
    x = tensors(16)
    zeros = torch._efficientzerotensor(x[0].shape, dtype=x[0].dtype)
    assert zeros.stride() == torch.zeros(x[0].shape).stride()
    for _ in range(2):
        (launch,) = launched(lambda: lal_attention(zeros, *x[1:]))
        assert launch.parameters[0] != 0, "the kernel would read from nowhere"


@scenario
def operators_own_what_they_use():
    """A graph that is captured may run once before, in memory of its own, which must not be kept."""
    x = tensors()
    lal_attention(*x)
    (kept,) = launched(lambda: lal_attention(*x))
    arguments = (*x, None, None, None, None, None, D**-0.5, None, None)
    (own,) = launched(lambda: torch.ops.palkernels.lal_forward(*arguments))
    assert pointers_beyond(kept, x).isdisjoint(pointers_beyond(own, x))


@scenario
def a_capture_on_another_device_owns_what_it_uses():
    x = tensors()
    lal_attention(*x)
    (outside,) = launched(lambda: lal_attention(*x))
    stand_in.device = 1  # whose stream does not capture, while that of the tensors may
    try:
        (inside,) = launched(lambda: lal_attention(*x))
    finally:
        stand_in.device = 0
    assert pointers_beyond(outside, x).isdisjoint(pointers_beyond(inside, x))


@scenario
def what_changes_compilation_takes_the_long_way():
    x, project = tensors(16), projected()
    lal_attention(*x)
    project()
    for holder, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.runtime, "add_stages_inspection_hook", lambda *args: ("", "") if not args else None),
    ):
        before = getattr(holder, name)
        setattr(holder, name, value)
        try:
            assert long_launches(lambda: lal_attention(*x)) == 1, name
            assert long_launches(project) >= 1, name
        finally:
            setattr(holder, name, before)
    assert long_launches(lambda: lal_attention(*x)) == 0
    before, knobs.compilation.instrumentation_mode = knobs.compilation.instrumentation_mode, "consan"
    try:
        assert not repeatable(0)
    finally:
        knobs.compilation.instrumentation_mode = before
    assert repeatable(0)


@scenario
def all_launches_give_way_alike():
    """Backward's and audio_kv's, too: while a graph captures, for hooks, under a profiler."""
    x, project = tensors(16, grad=True), projected()
    backward(x)
    project()
    out = lal_attention(*x)
    upstream = torch.ones_like(out)
    back = lambda: torch.autograd.grad(out, x, upstream, retain_graph=True)  # noqa: E731
    count = long_launches(lambda: [back(), project()])
    assert count == 0, count
    stand_in.capturing = True
    try:
        assert long_launches(back) == 2
        assert long_launches(project) == 1
    finally:
        stand_in.capturing = False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert long_launches(back) == 2
        assert long_launches(project) == 1
    stand_in.capturing = True  # to see the kernels
    for kernel in launched_kernels(lambda: [back(), project()]):
        stand_in.capturing = False
        names = []
        kernel.add_pre_run_hook(lambda *args, **kwargs: names.append("before"))  # noqa: B023
        back()
        project()
        kernel.pre_run_hooks.clear()
        assert names == ["before"], kernel


def launched_kernels(call):
    before = len(LONG)
    call()
    return list(dict.fromkeys(LONG[before:]))


@scenario
def misaligned_gradients_and_states_get_another_kernel():
    x = tensors(16, grad=True)
    backward(x)
    out = lal_attention(*x)
    odd = torch.ones(out.numel() + 1, dtype=out.dtype)[1:].view(out.transpose(1, 2).shape).transpose(1, 2)
    assert long_launches(lambda: torch.autograd.grad(out, x, odd, retain_graph=True)) == 2
    run = lambda states: audio_kv(states, *weights, num_kv_heads=HKV, eps=1e-5)  # noqa: E731
    weights = [torch.randn(s).to(torch.bfloat16) for s in ((64,), (HKV * D, 64), (HKV * D, 64))]
    run(torch.zeros(2, 20, 64, dtype=torch.bfloat16))
    states = torch.zeros(2 * 20 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 20, 64)
    for _ in range(2):
        assert long_launches(lambda: run(states)) == 1


@scenario
def shapes_strides_and_dtypes_are_told_apart():
    x = tensors(16)
    lal_attention(*x)
    fewer = [*x[:3], *[t[:, :, :7] for t in x[3:]]]
    assert long_launches(lambda: lal_attention(*fewer)) == 1, "of another shape, with the same strides"
    laid_out = [*x[:3], *[t.contiguous() for t in x[3:]]]
    assert long_launches(lambda: lal_attention(*laid_out)) == 1, "of other strides, with the same shape"
    half = tensors(16, dtype=torch.float16)
    assert long_launches(lambda: lal_attention(*half)) == 1, "of another dtype"
    lengths = torch.full((2,), 5)
    lal_attention(*x, audio_lengths=lengths)
    assert long_launches(lambda: lal_attention(*x, audio_lengths=lengths.int())) == 1
    elsewhere = torch.empty_strided(x[1].shape, x[1].stride(), dtype=x[1].dtype, device="meta")
    must_raise(ValueError, "key must be on query's device", lambda: lal_attention(x[0], elsewhere, *x[2:]))


@scenario
def a_grown_text_is_checked_as_a_new_one():
    """All that the number of text keys does not change must be as it was."""
    x = tensors(keys=32)
    lal_attention(*x)
    grown = tensors(keys=40)
    assert long_launches(lambda: lal_attention(*grown)) == 0
    wide = [torch.zeros(2, 41, HKV * D + 8, dtype=torch.bfloat16)[..., : HKV * D] for _ in range(2)]
    odd = [t.unflatten(2, (HKV, D)).transpose(1, 2) for t in wide]
    assert long_launches(lambda: lal_attention(grown[0], *odd, *grown[3:])) == 1, "strides that are no multiples of 16"
    for key, error, message in (
        (tensors(keys=42)[1].half(), TypeError, "must share one dtype"),
        (torch.zeros(2, 2 * HKV, 42, D, dtype=torch.bfloat16), ValueError, "audio_key must be"),
    ):
        must_raise(error, message, lambda: lal_attention(x[0], key, key.clone(), *x[3:]))  # noqa: B023
    shorter = grown[2][:, :, :39]
    must_raise(ValueError, "value must be of key's shape", lambda: lal_attention(*grown[:2], shorter, *grown[3:]))


@scenario
def strides_are_of_one_class_where_one_kernel_takes_them():
    usual = (4096, 128, 64, 1)

    def classes(strides, shape=(1, 2, 4, 64)):
        return _classes(torch.empty_strided(shape, strides, device="meta"))

    assert classes(usual) == classes((8192, 256, 128, 1))
    others = [(4096, 128, 64, 2), (4096, 128, 72, 1), (2**31, 128, 64, 1), (1, 128, 64, 1)]
    assert len({classes(usual), *map(classes, others)}) == 5
    assert classes(usual, (1, 2, 4, 64)) != classes((4096, 2**31 - 64, 64, 1))  # within a row, too, 32 bits are short


@scenario
def the_lock_is_held_where_plans_change():
    class Watched(dict):
        def __setitem__(self, key, value):
            assert kept._lock.locked()
            super().__setitem__(key, value)

        def __delitem__(self, key):
            assert kept._lock.locked()
            super().__delitem__(key)

    kept, most = plans.Plans(), plans.MOST_PLANS
    kept._plans = Watched()
    plans.MOST_PLANS = 3
    try:
        for number in range(9):
            kept.keep(number, number)
    finally:
        plans.MOST_PLANS = most
    assert list(kept._plans) == [6, 7, 8]


if __name__ == "__main__":
    main()
