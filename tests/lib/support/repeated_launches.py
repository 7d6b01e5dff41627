"""A repeated launch is what the long way launches, and takes the host little. Run as a script; see support.planned."""

import contextlib
import weakref

import torch

from palkernels import audio_kv, plans, quantize_audio_kv
from palkernels.attention import plans as attention_plans
from palkernels.kernels.ready import ReadyLaunch
from support.counting import count_calls
from support.planned import (
    HKV,
    HQ,
    D,
    backward,
    check_repeats,
    lal_attention,
    launched,
    long_launches,
    main,
    must_raise,
    options,
    same,
    scenario,
    tensors,
    the_long_way,
)  # fmt: skip  # isort: skip


@contextlib.contextmanager
def allocations():
    """The functions called meanwhile that make tensors."""
    made, replaced = [], []

    def counting(function):
        return lambda *args, **kwargs: made.append(function.__name__) or function(*args, **kwargs)

    functions = ("empty", "empty_strided", "empty_like", "zeros", "zeros_like", "ones", "full", "cat", "arange")
    methods = ("new_empty", "new_zeros", "new_empty_strided", "to", "contiguous", "clone")
    for home, names in ((torch, functions), (torch.Tensor, methods)):
        for name in names:
            replaced.append((home, name, vars(home).get(name), getattr(home, name)))
            setattr(home, name, counting(getattr(home, name)))
    try:
        yield made
    finally:
        for home, name, own, _ in replaced:
            delattr(home, name) if own is None else setattr(home, name, own)


@scenario
def forward_is_repeated():
    check_repeats(lambda: tensors(16), lambda x: lal_attention(*x), 1)
    check_repeats(lambda: tensors(16), lambda x: lal_attention(*x, softcap=3.0, window=7, scale=0.3), 1)


@scenario
def decoding_is_repeated():
    check_repeats(tensors, lambda x: lal_attention(*x), 1)
    make = lambda: [*tensors(), *options().values()]  # noqa: E731
    check_repeats(make, lambda x: lal_attention(*x[:5], audio_lengths=x[5], text_start=x[6]), 1)
    index = lambda: [*tensors(), torch.tensor([1, 0]), torch.tensor([16, 9])]  # noqa: E731
    check_repeats(index, lambda x: lal_attention(*x[:5], audio_index=x[5], text_end=x[6]), 1)
    visible = lambda: [*tensors(), torch.zeros(2, 20, dtype=torch.int64)]  # noqa: E731
    check_repeats(visible, lambda x: lal_attention(*x[:5], audio_visible_from=x[5]), 1)


@scenario
def audio_in_eight_bits_is_repeated():
    def make(queries=1, keys=16):
        query, key, value, *audio = tensors(queries, keys)
        return [query, key, value, *quantize_audio_kv(*audio)]

    call = lambda x: lal_attention(*x[:5], audio_key_scale=x[5], audio_value_scale=x[6])  # noqa: E731
    lal_attention(*tensors(16))
    assert long_launches(lambda: call(make(16))) == 1, "audio in eight bits took the kernel of 16"
    assert long_launches(lambda: lal_attention(*tensors(16))) == 0
    for queries in (1, 16):
        check_repeats(lambda: make(queries), call, 1)  # noqa: B023
        assert long_launches(lambda: [call(make(queries, 16 + n)) for n in range(40)]) == 0  # noqa: B023
        for place in (0, 6):
            given = make(queries)
            given[place].requires_grad_()
            must_raise(ValueError, "no tensor must require gradients", lambda: call(given))  # noqa: B023
            with torch.no_grad():
                assert long_launches(lambda: call(given)) == 0  # noqa: B023


@scenario
def backward_is_repeated():
    make = lambda: tensors(16, grad=True)  # noqa: E731
    check_repeats(make, backward, 3)
    check_repeats(make, lambda x: backward(x, with_lse=True), 3)
    frozen = lambda: [t.requires_grad_(i in (1, 4)) for i, t in enumerate(tensors(16))]  # noqa: E731
    check_repeats(frozen, lambda x: backward(x, slice(1, 5, 3)), 3)


@scenario
def audio_kv_is_repeated():
    def make(layers=None, grad=False):
        of = lambda *shape: torch.randn(shape).to(torch.bfloat16).requires_grad_(grad)  # noqa: E731
        weights = [(64,), (HKV * D, 64), (HKV * D, 64), (D,)]
        per_layer = [of(*s) if layers is None else [of(*s) for _ in range(layers)] for s in weights]
        return [of(2, 20, 64), *per_layer, torch.randn(20, D), torch.randn(20, D)]

    def call(x):
        states, norm, k, v, head_norm, cos, sin = x
        return audio_kv(states, norm, k, v, num_kv_heads=HKV, eps=1e-5, k_norm_weight=head_norm, cos=cos, sin=sin)

    def with_gradients(x):
        key, value = call(x)
        torch.autograd.backward([key, value], [torch.ones_like(key), torch.ones_like(value)])

    for make_one, run, count in (
        (make, call, 2), (lambda: make(grad=True), call, 2), (lambda: make(grad=True), with_gradients, 5),
    ):  # fmt: skip
        run(make_one())
        assert long_launches(lambda: run(make_one())) == 0  # noqa: B023
        given = make_one()
        repeated = launched(lambda: run(given))  # noqa: B023
        with the_long_way(count):
            leaves = [x.data_ptr() for x in given]
            same(repeated, launched(lambda: run(given)), leaves)  # noqa: B023
    call(make(3))
    assert long_launches(lambda: call(make(3))) == 0
    turning = make()
    call(turning)
    turning[-1].requires_grad_()
    must_raise(ValueError, "must not require gradients", lambda: call(turning))


@scenario
def a_growing_cache_is_no_miss():
    call = lambda x: lal_attention(*x[:5], **options(), window=x[5])  # noqa: E731
    for window in (None, 1000, 7):
        call([*tensors(keys=32), window])
        assert long_launches(lambda: [call([*tensors(keys=32 + n), window]) for n in range(100)]) == 0  # noqa: B023
        for keys in (33, 90, 131, 400):
            given = [*tensors(keys=keys), window]
            repeated = launched(lambda: call(given))  # noqa: B023
            with the_long_way():
                same(repeated, launched(lambda: call(given)), [x.data_ptr() for x in given[:5]])  # noqa: B023
            found = []
            for before in ([*tensors(keys=32), window], given):
                plans.forget_all()
                call(before)
                call(given)
                found.append(list(attention_plans.FORWARD._plans.values())[-1])
            grown, anew = found
            assert grown[1:] == anew[1:]  # the memory that its programs share, too
    # The prefill too, where it follows a cache.
    lal_attention(*tensors(16, 32))
    assert long_launches(lambda: [lal_attention(*tensors(16, 32 + n)) for n in range(20)]) == 0
    must_raise(ValueError, "S must be at least T", lambda: lal_attention(*tensors(16, 8)))
    short_value = tensors(keys=40)
    short_value[2] = short_value[2][:, :, :39]
    must_raise(ValueError, "value must be of key's shape", lambda: lal_attention(*short_value))


@scenario
def a_window_is_met_as_the_text_grows_past_it():
    call = lambda x: launched(lambda: lal_attention(*x, window=40))  # noqa: E731
    for keys in (38, 39, 40, 41, 42):
        x = tensors(keys=keys)
        got = call(x)
        with the_long_way():
            same(got, call(x), [t.data_ptr() for t in x])


@scenario
def what_a_launch_is_given_is_alive():
    """An allocator may hand out again what is freed before it is used."""
    made, empty, empty_like, run = [], torch.empty, torch.empty_like, ReadyLaunch.run

    def watched(function):
        def call(*args, **kwargs):
            new = function(*args, **kwargs)
            made.append(weakref.ref(new))
            return new

        return call

    def run_and_look(*args):
        assert len(made) == 6, "five gradients, and the rows' statistics"
        assert all(reference() is not None for reference in made)
        run(*args)

    leaves = tensors(16, grad=True)
    for _ in range(2):
        out = lal_attention(*leaves)
        upstream = torch.ones_like(out)
        torch.autograd.grad(out, leaves, upstream)
    out = lal_attention(*leaves)
    torch.empty, torch.empty_like, ReadyLaunch.run = watched(empty), watched(empty_like), run_and_look
    try:
        assert long_launches(lambda: torch.autograd.grad(out, leaves, upstream)) == 0
    finally:
        torch.empty, torch.empty_like, ReadyLaunch.run = empty, empty_like, run


@scenario
def a_repetition_allocates_its_outputs():
    plain, decoding, leaves, given = tensors(16), tensors(), tensors(16, grad=True), options()
    for call in (lambda: lal_attention(*plain), lambda: lal_attention(*decoding, **given)):
        call()
        with allocations() as made:
            call()
        assert len(made) == 2, made
    for _ in range(2):
        out = lal_attention(*leaves)
        upstream = torch.ones_like(out)
        with allocations() as made:
            torch.autograd.grad(out, leaves, upstream)
    assert made == ["empty_like"] * 5 + ["empty"], made  # five gradients, and the rows' statistics


@scenario
def a_repetition_makes_few_python_calls():
    plain, decoding, leaves = tensors(16), tensors(), tensors(16, grad=True)
    given = options()
    upstream = torch.ones(2, 16, HQ, D, dtype=torch.bfloat16).transpose(1, 2)
    made = {}
    for name, call in {
        "forward": lambda: lal_attention(*plain),
        "decode": lambda: lal_attention(*decoding, **given),
        "with gradients": lambda: lal_attention(*leaves),
        "and backward": lambda: torch.autograd.grad(lal_attention(*leaves), leaves, upstream),
    }.items():
        for _ in range(3):  # what is made once, also by others
            call()
        made[name], _ = count_calls(call)
    most = {"forward": 26, "decode": 29, "with gradients": 60, "and backward": 150}  # the last two by PyTorch's
    assert all(made[name] <= most[name] for name in most), made


@scenario
def what_is_saved_must_not_change():
    x = tensors(16, grad=True)
    backward(x)
    out = lal_attention(*x)
    with torch.no_grad():
        x[1].mul_(2)
    must_raise(RuntimeError, "modified by an inplace operation", lambda: out.sum().backward())


@scenario
def plans_are_bounded():
    most, plans.MOST_PLANS = plans.MOST_PLANS, 8
    try:
        for n in range(20):
            lal_attention(*tensors(2, 30 + n))
        assert len(attention_plans.FORWARD) <= 8
        assert long_launches(lambda: lal_attention(*tensors(2, 49))) == 0
    finally:
        plans.MOST_PLANS = most


if __name__ == "__main__":
    main()
