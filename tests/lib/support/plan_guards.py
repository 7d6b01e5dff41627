"""Where a launch must not be repeated, the long way is taken. Run as a script; see support.planned."""

import contextlib
import os
import signal
import threading
import traceback
import weakref

import torch
from torch.overrides import TorchFunctionMode
from triton import knobs

from palkernels import audio_kv
from palkernels.attention import plans as attention_plans
from palkernels.kernels import tiles
from support.planned import (
    HKV,
    LONG,
    D,
    Watch,
    backward,
    lal_attention,
    launched,
    long_launches,
    main,
    must_raise,
    options,
    pointers_beyond,
    scenario,
    stand_in,
    tensors,
)  # fmt: skip  # isort: skip


# The first: PyTorch's profiler, once used, does not outlive a fork.
@scenario
def a_forked_process_starts_anew():
    x = tensors()
    lal_attention(*x)
    attention_plans.FORWARD._lock.acquire()  # as a thread of the parent's may hold it
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            torch.cuda._is_in_bad_fork = lambda: False  # what CUDA forbids, a stand-in may
            fresh = len(attention_plans.FORWARD) == 0
            lal_attention(*tensors(keys=19))
            lal_attention(*x)
            code = 0 if fresh and len(attention_plans.FORWARD) == 2 else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    attention_plans.FORWARD._lock.release()
    _, status = os.waitpid(child, 0)
    assert status == 0, status


@scenario
def every_stream_has_its_own_scratch():
    x = tensors()
    lal_attention(*x)
    scratch = {}
    for stream in (0, 7, 9):
        stand_in.stream = stream
        for _ in range(2):
            (launch,) = launched(lambda: lal_attention(*x))
            assert launch.stream == stream
        scratch[stream] = pointers_beyond(launch, x)
    stand_in.stream = 0
    assert scratch[0].isdisjoint(scratch[7])
    assert scratch[7].isdisjoint(scratch[9])
    assert long_launches(lambda: lal_attention(*x)) == 0


@scenario
def another_device_takes_the_long_way():
    x = tensors()
    lal_attention(*x)
    stand_in.device = 1
    try:
        assert long_launches(lambda: lal_attention(*x)) == 1
    finally:
        stand_in.device = 0
    assert long_launches(lambda: lal_attention(*x)) == 0


@scenario
def a_capture_owns_what_it_uses():
    x = tensors()
    lal_attention(*x)
    (outside,) = launched(lambda: lal_attention(*x))
    stand_in.capturing = True
    try:
        before = len(LONG)
        (inside,) = launched(lambda: lal_attention(*x))
        assert len(LONG) == before + 1
        new = tensors(keys=77, queries=2)
        lal_attention(*new)
    finally:
        stand_in.capturing = False
    assert pointers_beyond(outside, x).isdisjoint(pointers_beyond(inside, x))
    assert long_launches(lambda: lal_attention(*new)) == 1, "a launch of a capture was kept"


@scenario
def autocast_converts():
    x = tensors(16)
    assert lal_attention(*x).dtype == torch.bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            for _ in range(2):
                assert lal_attention(*x).dtype == dtype
    single = tensors(16, dtype=torch.float32)
    lal_attention(*single)
    with torch.autocast("cpu", torch.bfloat16):
        assert lal_attention(*single).dtype == torch.bfloat16


@scenario
def modes_see_the_operator():
    x = tensors(16)
    lal_attention(*x)
    with Watch() as mode:
        lal_attention(*x)
    assert mode.seen == ["palkernels.lal_forward.default"], mode.seen

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Functions():
        assert long_launches(lambda: lal_attention(*x)) == 1
    with torch.device("cpu"):  # as torch.set_default_device: it only makes new tensors
        assert long_launches(lambda: lal_attention(*x)) == 0

    norm, weight = torch.ones(64, dtype=torch.bfloat16), torch.randn(HKV * D, 64).to(torch.bfloat16)
    states = torch.randn(2, 20, 64).to(torch.bfloat16).requires_grad_()
    for watched in (False, True):
        with Watch() if watched else contextlib.nullcontext() as mode:
            made = audio_kv(states, norm, weight, weight.clone(), num_kv_heads=HKV, eps=1e-5)
            torch.autograd.backward(made, [torch.ones_like(x) for x in made])
    assert {"palkernels.audio_kv_forward.default", "palkernels.audio_kv_backward.default"} <= set(mode.seen)

    leaves = tensors(16, grad=True)
    backward(leaves)
    out = lal_attention(*leaves)
    with Watch() as mode:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert "palkernels.lal_backward.default" in mode.seen, mode.seen


@scenario
def hooks_are_called():
    x = tensors(16)
    lal_attention(*x)
    names = []
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
        chain.add(hook)
        lal_attention(*x)
        chain.remove(hook)
        assert names == ["forward_kernel"]
        names.clear()
    kernel = LONG[-1]
    kernel.add_pre_run_hook(lambda *args, **kwargs: names.append("before"))
    lal_attention(*x)
    kernel.pre_run_hooks.clear()
    assert names == ["before"]


@scenario
def the_profiler_sees_the_operator():
    x = tensors(16)
    lal_attention(*x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        lal_attention(*x)
    assert "palkernels::lal_forward" in {event.key for event in profiler.key_averages()}


@scenario
def subclasses_decide_for_themselves():
    seen = []

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            kept = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), 0, None, inner.dtype)
            kept.inner = inner
            return kept

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            unwrap = lambda x: x.inner if isinstance(x, cls) else x  # noqa: E731
            return func(*torch.utils._pytree.tree_map(unwrap, args), **(kwargs or {}))

    x = tensors(16)
    lal_attention(*x)
    lal_attention(Wrapper(x[0]), *x[1:])
    assert "palkernels.lal_forward.default" in seen
    negative = torch._neg_view(x[0])
    before = stand_in.launches()
    lal_attention(negative, *x[1:])
    (launch,) = stand_in.launched(before)
    assert x[0].data_ptr() not in launch.parameters, "the kernel would read the values without their sign"


@scenario
def transforms_are_refused():
    x = tensors(16)
    lal_attention(*x)
    run = lambda query: lal_attention(query, *x[1:])  # noqa: E731
    must_raise(NotImplementedError, "torch.func", lambda: torch.vmap(run)(x[0][None]))
    must_raise(NotImplementedError, "torch.func", lambda: torch.func.grad(lambda q: run(q).sum())(x[0]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        must_raise(NotImplementedError, "forward-mode", lambda: run(dual))


@scenario
def threads_do_not_mix_their_tensors():
    lal_attention(*tensors())
    sets, wrong = {}, []

    def work(number):
        for step in range(60):
            x = tensors(keys=16 + (step + number) % 40)
            sets[number, step] = x  # kept, so that no address is used twice
            lal_attention(*x)

    before = stand_in.launches()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by_query = {x[0].data_ptr(): x for x in sets.values()}
    for launch in stand_in.launched(before):
        x = by_query[launch.parameters[0]]
        if not {t.data_ptr() for t in x} <= set(launch.parameters) or x[1].shape[2] not in launch.parameters:
            wrong.append(launch)
    assert stand_in.launches() - before == 480
    assert not wrong, wrong[:2]


@scenario
def plans_keep_no_tensors():
    x = tensors(16, grad=True)
    backward(x)
    references = [weakref.ref(t) for t in x]
    del x
    assert not any(reference() is not None for reference in references)


@scenario
def misaligned_views_get_another_kernel():
    x = tensors(16)
    lal_attention(*x)
    for place in range(5):
        shifted = list(x)
        base = torch.zeros(x[place].numel() + 1, dtype=torch.bfloat16)
        shifted[place] = base[1:].view(x[place].transpose(1, 2).shape).transpose(1, 2)
        assert shifted[place].stride() == x[place].stride()
        for _ in range(2):
            assert long_launches(lambda: lal_attention(*shifted)) == 1  # noqa: B023
    given = options()
    lal_attention(*x, **given)
    given["audio_lengths"] = torch.zeros(3, dtype=torch.int64)[1:]
    assert long_launches(lambda: lal_attention(*x, **given)) == 1


@scenario
def one_tensor_in_two_places_is_not_learnt():
    query, key, _, audio_key, audio_value = tensors(16, 24, batch=3)
    twice = lambda key, value: lal_attention(query, key, value, audio_key, audio_value)  # noqa: E731
    twice(key, key)
    other = torch.randn(3, 24, HKV, D).to(torch.bfloat16).transpose(1, 2)
    (launch,) = launched(lambda: twice(key, other))
    assert {key.data_ptr(), other.data_ptr()} <= set(launch.parameters)


@scenario
def other_tiles_are_used():
    x = tensors(64, 80)
    lal_attention(*x)
    (usual,) = launched(lambda: lal_attention(*x))
    with tiles.use(tiles.Tile(32, 32, 4, 1)):
        for _ in range(2):
            (other,) = launched(lambda: lal_attention(*x))
            assert other.grid != usual.grid
    assert launched(lambda: lal_attention(*x))[0].grid == usual.grid
    fresh = tensors(72, 80)
    with tiles.use(tiles.Tile(32, 32, 4, 1)):
        (other,) = launched(lambda: lal_attention(*fresh))
    assert launched(lambda: lal_attention(*fresh))[0].grid != other.grid


@scenario
def values_are_checked_where_that_is_wanted():
    x, given = tensors(16), options()
    lal_attention(*x, **given)
    given["audio_lengths"] = torch.full((2,), 99)
    lal_attention(*x, **given)  # clamped by the kernel
    os.environ["PALKERNELS_CHECK"] = "1"
    try:
        must_raise(ValueError, "audio_lengths must be 0 to N", lambda: lal_attention(*x, **given))
    finally:
        del os.environ["PALKERNELS_CHECK"]


@scenario
def equal_numbers_of_other_types_are_checked():
    x = tensors(16)
    lal_attention(*x, scale=1.0, window=1)
    must_raise(TypeError, "scale must be a number", lambda: lal_attention(*x, scale=True, window=1))
    must_raise(TypeError, "window must be an int", lambda: lal_attention(*x, scale=1.0, window=1.0))
    must_raise(TypeError, "window must be an int", lambda: lal_attention(*x, scale=1.0, window=[1]))
    must_raise(TypeError, "key must be a tensor", lambda: lal_attention(x[0], None, *x[2:]))
    assert lal_attention(*x, scale=1.0, window=1, impl="sdpa").shape == x[0].shape


@scenario
def recomputed_keys_are_known():
    states, norm, weight = torch.randn(2, 20, 64), torch.ones(64), torch.randn(HKV * D, 64)
    arguments = [x.to(torch.bfloat16) for x in (states, norm, weight, weight.clone())]
    weights = [arguments[0], *(x.requires_grad_() for x in arguments[1:])]
    x = tensors(16)

    def attend(view=False):
        key, value = audio_kv(*weights, num_kv_heads=HKV, eps=1e-5, recompute=True)
        key = key[:, :] if view else key
        return lal_attention(*x[:3], key, value), (key, value)

    kept = []
    for _ in range(2):
        out, (key, value) = attend()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            out = lal_attention(*x[:3], key, value)
        assert not {key.data_ptr(), value.data_ptr()} & set(kept)
        out.sum().backward()
    must_raise(ValueError, "got a view of it", lambda: attend(view=True))


if __name__ == "__main__":
    main()
