"""Launches of the Gluon forward, switched on, are repeated as others are. Run as a script; see support.planned."""

import os

os.environ["PALKERNELS_GLUON"] = "1"  # read once, with the kernels

import torch

from support.planned import (
    backward,
    check_repeats,
    lal_attention,
    launched,
    long_launches,
    main,
    options,
    same,
    scenario,
    tensors,
    the_long_way,
)  # isort: skip

GLUON, TRITON = "gluon_forward_kernel", "forward_kernel"


def kernels(call):
    return [launch.kernel for launch in launched(call)]


@scenario
def the_gluon_forward_is_repeated():
    check_repeats(lambda: tensors(16), lambda x: lal_attention(*x), 1)
    make = lambda: [*tensors(16), *options().values()]  # noqa: E731
    check_repeats(make, lambda x: lal_attention(*x[:5], audio_lengths=x[5], text_start=x[6]), 1)
    assert [kernels(lambda: lal_attention(*tensors(16))) for _ in range(2)] == [[GLUON]] * 2


@scenario
def the_gluon_forward_is_repeated_with_gradients():
    make = lambda: tensors(16, grad=True)  # noqa: E731
    check_repeats(make, backward, 3)
    assert kernels(lambda: backward(make()))[0] == GLUON


@scenario
def a_gluon_launch_grows_with_its_text():
    lal_attention(*tensors(16, 32))
    assert long_launches(lambda: [lal_attention(*tensors(16, 32 + n)) for n in range(20)]) == 0
    given = tensors(16, 90)
    repeated = launched(lambda: lal_attention(*given))
    with the_long_way():
        same(repeated, launched(lambda: lal_attention(*given)), [x.data_ptr() for x in given])
    assert repeated[0].kernel == GLUON


@scenario
def what_gluon_does_not_take_is_tritons_in_any_order():
    x = tensors(16)
    moved = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride(), 1) for t in x]
    for _ in range(2):
        assert kernels(lambda: lal_attention(*x, window=7)) == [TRITON]
        assert kernels(lambda: lal_attention(*x)) == [GLUON]
        assert kernels(lambda: lal_attention(*moved)) == [TRITON]  # of the same geometry, but not aligned
        assert kernels(lambda: lal_attention(*(t.half().double().half() for t in x))) == [GLUON]
        assert kernels(lambda: lal_attention(*(t.float() for t in x))) == [TRITON]


if __name__ == "__main__":
    main()
