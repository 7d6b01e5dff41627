"""Calls of one geometry, one after another: on a GPU all but the first repeat its launches, with other tensors."""

import pytest
import torch
from support.kernel_runs import attention

from palkernels import lal_attention
from palkernels.attention import plans
from palkernels.plans import forget_all
from palkernels.testing import lal_case, max_error

SHAPE = {"batch": 3, "heads": 6, "kv_heads": 2, "audio": 19, "dim": 32}
FEATURES = ("lengths", "text_start", "index")


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 20], ids=["decode", "forward"])
def test_repeated_calls_are_right(device, queries):
    """Output, LSE and gradients of the first call and of the ones that look alike."""
    forget_all()
    for seed in range(3):
        shape = SHAPE | {"queries": queries, "keys": 23}
        case = lal_case(**shape, features=FEATURES, audio_rows=2, seed=seed, device=device)
        for got, want in zip(attention(case, "triton"), attention(case, "reference"), strict=True):
            assert max_error(got, want) <= 1e-4
    assert (len(plans.FORWARD), len(plans.BACKWARD)) == ((1, 1) if device == "cuda" else (0, 0))


@pytest.mark.gpu
@torch.no_grad()
def test_a_text_that_grows_is_right(device):
    forget_all()
    for keys in (30, 31, 32, 33, 47):
        case = lal_case(**SHAPE, queries=1, keys=keys, features=FEATURES, audio_rows=2, seed=keys, device=device)
        got = lal_attention(*case.tensors, **case.options, impl="triton")
        assert max_error(got, lal_attention(*case.tensors, **case.options, impl="reference")) <= 1e-4
    assert (len(plans.GROWING), len(plans.FORWARD)) == ((1, 5) if device == "cuda" else (0, 0))


@pytest.mark.cuda_only
@pytest.mark.gpu
@torch.no_grad()
def test_repeated_calls_on_other_streams_and_in_graphs():
    cases = [lal_case(**SHAPE, queries=1, keys=40, features=("lengths",), seed=seed, device="cuda") for seed in (0, 1)]
    run = [lambda case=case: lal_attention(*case.tensors, **case.options, impl="triton") for case in cases]
    wants = [lal_attention(*case.tensors, **case.options, impl="reference") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(20):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[number].append(run[number]())
    torch.cuda.synchronize()
    assert max(max_error(out, want) for which, want in zip(outs, wants, strict=True) for out in which) <= 1e-4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run[0]()
    for _ in range(3):
        graph.replay()
        run[1]()
    torch.cuda.synchronize()
    assert max_error(captured, wants[0]) <= 1e-4
