"""The Triton kernels against float64: here in the interpreter, with ``--device cuda`` compiled on a GPU."""

import contextlib
import math

import pytest
import torch
from support import interpreter
from support.kernel_runs import attention, strict

from palkernels import lal_attention
from palkernels.kernels import launch, operands, tiles
from palkernels.testing import FEATURES, LalCase, fill_unreachable, lal_case, max_error

pytestmark = pytest.mark.gpu


CASE = {"batch": 2, "heads": 2, "kv_heads": 1, "queries": 21, "keys": 40, "audio": 45, "dim": 32}


def test_reruns_are_bitwise_the_same(device):
    case = lal_case(**CASE, features=FEATURES, audio_rows=2, device=device)
    first = attention(case, "triton")
    for _ in range(99 if device == "cuda" else 9):
        for got, want in zip(attention(case, "triton"), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("seed", range(12))
def test_what_no_query_sees_may_hold_anything(device, seed):
    """NaN and Inf beyond lengths and ends, in padding and in clips that nobody reads: bitwise as with zeros there."""
    features = [name for bit, name in enumerate(FEATURES) if ((seed * 37 + 11) >> bit) & 1] if seed else FEATURES
    case = lal_case(**CASE, features=features, audio_rows=4, seed=seed, device=device)
    zeros = attention(fill_unreachable(case, 0.0), "triton")
    assert all(x.isfinite().all() for x in zeros[2:])
    for value in (math.nan, math.inf, -math.inf):
        for got, want in zip(attention(fill_unreachable(case, value), "triton"), zeros, strict=True):
            assert torch.equal(got, want), (case.name, value)


def test_queries_that_see_nothing(device):
    """A query that sees nothing gets output 0, LSE -inf and gradients 0, whatever it and the upstream gradient hold."""
    case = lal_case(**CASE | {"batch": 3, "queries": 40}, device=device)
    case.options.update(
        text_start=torch.tensor([39, 41, 0], device=device),  # rows of 39 and 40 blind queries, and of none
        audio_lengths=torch.tensor([0, 0, 45], device=device),
    )
    blind = torch.zeros(3, 2, 40, dtype=torch.bool, device=device)
    blind[0, :, :39] = True
    blind[1] = True
    grads = []
    for fill in (0.0, 1.0, math.nan):
        leaves = LalCase("", (case.tensors[0].masked_fill(blind[..., None], fill), *case.tensors[1:]))
        leaves = leaves.requires_grad().tensors
        out, lse = lal_attention(*leaves, **case.options, return_lse=True, impl="triton")
        assert (out[blind] == 0).all()
        assert (lse[blind] == -math.inf).all()
        dout = torch.ones_like(out).masked_fill(blind[..., None], fill)
        dlse = torch.ones_like(lse).masked_fill(blind, fill)
        grads.append(torch.autograd.grad([out, lse], leaves, [dout, dlse]))
    for others in grads[1:]:
        for got, want in zip(others, grads[0], strict=True):
            assert torch.equal(got, want)
    assert (grads[0][0][blind] == 0).all()
    assert all(x.isfinite().all() for x in grads[0])


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "audio", "lengths"])
def test_nothing_to_attend_to(device, empty):
    shape = CASE | ({"queries": 0, "keys": 0} if empty == "keys" else {empty: 0} if empty != "lengths" else {})
    case = lal_case(**shape, device=device)
    if empty == "lengths":
        case.options["audio_lengths"] = torch.zeros(2, dtype=torch.int32, device=device)
    want = attention(case.to(torch.float64), "reference")
    for got, expected in zip(attention(case, "triton"), want, strict=True):
        assert got.shape == expected.shape
        assert max_error(got, expected) <= 1e-5


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensor's numbers laid out in other ways, with NaN beside them."""
    batch, heads, tokens, dim = tensor.shape
    nan = {"fill_value": math.nan, "dtype": tensor.dtype, "device": tensor.device}
    return {
        "tokens before heads": torch.full((batch, tokens, heads, dim), **nan).transpose(1, 2).copy_(tensor),
        "dims outermost": torch.full((dim, batch, tokens, heads), **nan).permute(1, 3, 2, 0).copy_(tensor),
        "every third dim": torch.full((batch, heads, tokens, 3 * dim), **nan)[..., 1::3].copy_(tensor),
        "within a cache": torch.full((batch + 1, heads + 2, tokens + 5, dim + 1), **nan)[1:, 1:-1, 2:-3, 1:].copy_(
            tensor
        ),
        "off alignment": torch.full((tensor.numel() + 1,), **nan)[1:].view(tensor.shape).copy_(tensor),
    }


@pytest.mark.parametrize("which", range(5))
def test_strides(device, which):
    """Every input may have any strides; so may the upstream gradient."""
    case = lal_case(**CASE, features=("lengths", "visible_from"), device=device)
    want = attention(case, "triton")
    for name, other in layouts(case.tensors[which]).items():
        tensors = [*case.tensors[:which], other, *case.tensors[which + 1 :]]
        # As new leaves with these strides: detach keeps them.
        got = attention(LalCase(name, tuple(tensors), case.options), "triton")
        assert all(max_error(x, y) <= 1e-5 for x, y in zip(got, want, strict=True)), name


def test_strides_of_upstream_gradients(device):
    case = lal_case(**CASE, device=device).requires_grad()
    out, lse = lal_attention(*case.tensors, return_lse=True, impl="triton")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    want = torch.autograd.grad([out, lse], case.tensors, [dout, dlse], retain_graph=True)
    for name, other in layouts(dout).items():
        slanted = dlse.transpose(1, 2).contiguous().transpose(1, 2)
        got = torch.autograd.grad([out, lse], case.tensors, [other, slanted], retain_graph=True)
        assert all(max_error(x, y) <= 1e-5 for x, y in zip(got, want, strict=True)), name
    expanded = torch.autograd.grad(out.sum(), case.tensors, retain_graph=True)  # every stride is 0
    ones = torch.autograd.grad(out, case.tensors, torch.ones_like(out))
    # On a GPU other strides compile to other code, whose sums have another order.
    bound = 1e-5 if device == "cuda" else 0
    assert all(max_error(x, y) <= bound for x, y in zip(expanded, ones, strict=True))


def test_expanded_inputs(device):
    """Keys expanded over heads and rows are read in place; their gradients come back per head and row, to be summed."""
    case = lal_case(**CASE, device=device)
    query, key, value, audio_key, audio_value = case.tensors
    expanded = LalCase("", (query, *(x[:1, :1].expand_as(x) for x in (key, value, audio_key, audio_value))))
    copied = LalCase("", tuple(x.contiguous() for x in expanded.tensors))
    for got, want in zip(attention(expanded, "triton"), attention(copied, "triton"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("which", ["batch", "head", "token"])
def test_offsets_beyond_32_bits(device, which):
    """Strides so large that offsets, in elements, pass 2^31; only the pages that are touched take memory."""
    shape = {"batch": 2, "heads": 2, "kv_heads": 2, "queries": 3, "keys": 3, "audio": 3, "dim": 8}
    case = lal_case(**shape, dtype=torch.float16, device=device)
    far = 2**31 + 16
    strides = {"batch": (far, 1024, 32, 1), "head": (32 * 1024, far, 32, 1), "token": (32, 64, far // 2 + 16, 1)}[which]
    span = sum((size - 1) * stride for size, stride in zip((2, 2, 3, 8), strides, strict=True)) + 1
    assert span > 2**31
    want = attention(case, "triton")
    for index in range(5):
        tensors = list(case.tensors)
        memory = torch.empty(span, dtype=torch.float16, device=device)
        tensors[index] = memory.as_strided(tensors[index].shape, strides).copy_(tensors[index])
        with strict(device):
            leaves = LalCase("", tuple(tensors), {}).requires_grad()
            out, lse = lal_attention(*leaves.tensors, return_lse=True, impl="triton")
            generator = torch.Generator().manual_seed(0)
            douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse)]
            grads = torch.autograd.grad([out, lse], leaves.tensors, douts)
        assert all(torch.equal(x, y) for x, y in zip((out, lse, *grads), want, strict=True)), (which, index)
        del memory, tensors, leaves


def test_more_programs_than_a_grid_axis_holds(device):
    """65,537 rows x heads: axes y and z of a grid end at 65,535. The interpreter runs the programs at the ends."""
    rows = 65_537
    case = lal_case(batch=rows, heads=1, kv_heads=1, queries=1, keys=1, audio=0, dim=8, device=device)
    some = range(rows) if device == "cuda" else [0, 65_534, 65_535, 65_536]
    with interpreter.only_programs(some) if device == "cpu" else contextlib.nullcontext():
        out, _, dquery, dkey, dvalue, *_ = attention(case, "triton", with_lse=False)
    chosen = torch.tensor(list(some), device=device)
    assert torch.equal(out[chosen], case.tensors[2][chosen])  # one key: its value
    want = attention(LalCase("", tuple(x[chosen] for x in case.tensors)), "reference", with_lse=False)
    for got, wanted in ((dquery[chosen], want[2]), (dkey[chosen], want[3])):
        assert max_error(got[[0, -3, -2, -1]], wanted[[0, -3, -2, -1]]) <= 1e-6
        assert max_error(got, wanted) <= 4e-6  # a GPU runs all: the largest error of 65,537 rows was 1.6e-6 on an H200
    assert dvalue[chosen].abs().min() > 0


def test_long_keys(device):
    """The kernels take 131,072 keys, half of them audio."""
    keys = 65_536
    case = lal_case(batch=1, heads=1, kv_heads=1, queries=1, keys=keys, audio=keys, dim=8, device=device)
    wide = tiles.use(tiles.Tile(16, 1024, 4, 1)) if device == "cpu" else contextlib.nullcontext()
    with wide:
        got = attention(case, "triton")
    for x, want in zip(got, attention(case.to(torch.float64), "reference"), strict=True):
        assert max_error(x, want) <= 1e-5


def test_shared_audio_is_neither_copied_nor_expanded(device, monkeypatch):
    """Several questions on one clip: its gradients are the sums, and kernels work on the tensors themselves."""
    launched = []
    run = launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: (launched.append(self), run(self)))
    case = lal_case(
        batch=5, heads=4, kv_heads=2, queries=3, keys=3, audio=40, dim=16,
        features=("index", "lengths"), audio_rows=1, device=device,
    ).requires_grad()  # fmt: skip
    out = lal_attention(*case.tensors, **case.options, impl="triton")
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, case.tensors, dout)

    known = {x.data_ptr() for x in (*case.tensors, *grads, out, dout)}
    matrices = [x for each in launched for x in each.arguments if isinstance(x, operands.Matrix) and x.ptr is not None]
    assert {x.ptr.data_ptr() for x in matrices} == known
    assert len(launched) == 3

    copies = [x.expand(5, -1, -1, -1) for x in case.tensors[3:]]
    lengths = case.options["audio_lengths"].expand(5)
    out = lal_attention(*case.tensors[:3], *copies, audio_lengths=lengths, impl="reference")
    for got, want in zip(grads, torch.autograd.grad(out, case.tensors, dout), strict=True):
        assert max_error(got, want) <= 1e-5


def test_more_readers_than_one_scan_holds(device):
    """audio_index is scanned in blocks of 128 text rows: readers of every block, and clips without any."""
    case = lal_case(
        batch=150, heads=1, kv_heads=1, queries=1, keys=1, audio=2, dim=8,
        features=("index",), audio_rows=4, device=device,
    )  # fmt: skip
    case.options["audio_index"] = torch.tensor([0] + [2] * 127 + [0] * 10 + [2] * 11 + [3], device=device)
    with strict(device):
        got = attention(case, "triton")
    for x, want in zip(got, attention(case.to(torch.float64), "reference"), strict=True):
        assert max_error(x, want) <= 1e-4


@pytest.mark.cuda_only
def test_cuda_graph():
    """Forward and backward replay in a CUDA graph, on new numbers in the same memory."""
    case = lal_case(**CASE, features=FEATURES, audio_rows=2, device="cuda", dtype=torch.bfloat16).requires_grad()

    def step():
        out, lse = lal_attention(*case.tensors, **case.options, return_lse=True, impl="triton")
        return [out, lse, *torch.autograd.grad(out.sum(), case.tensors)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in case.tensors:
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.cuda_only
def test_training_allocates_outputs_and_gradients_only():
    """The peak over forward and backward: out, LSE, two numbers a row and five gradients, and nothing of their size."""
    case = lal_case(
        batch=8, heads=32, kv_heads=8, queries=128, keys=128, audio=1500, dim=64,
        features=("index",), audio_rows=2, dtype=torch.bfloat16, device="cuda",
    ).requires_grad()  # fmt: skip
    dout = torch.randn(8, 128, 32, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    for _ in range(2):  # the first compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = lal_attention(*case.tensors, **case.options, impl="triton")
        grads = torch.autograd.grad(out, case.tensors, dout)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    lse = 8 * 32 * 128 * 4
    needed = out.nbytes + 3 * lse + sum(x.nbytes for x in grads)
    assert peak <= needed + 2**20
