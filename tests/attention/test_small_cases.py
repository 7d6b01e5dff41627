"""Small, sharp cases of the Triton kernels: tiles of 16 x 16, so that each crosses several blocks, in seconds.

Every option is set by hand to where an error by one shows. ``make mutants`` runs these first.
"""

import math

import pytest
import torch
from support.kernel_runs import attention, nan_statistics, strict

from palkernels import lal_attention
from palkernels.kernels import decode, tiles
from palkernels.testing import LalCase, fill_unreachable, lal_case, max_error

NAMES = ("out", "lse", "query", "key", "value", "audio_key", "audio_value")
# 33 packed rows of queries and 33 audio tokens: two blocks and one row. The text ends within a block.
SHAPE = {"batch": 2, "heads": 6, "kv_heads": 2, "queries": 11, "keys": 38, "audio": 33, "dim": 20}
INSERTED = [[(7 * token * (row + 2)) % 40 for token in range(33)] for row in range(2)]


@pytest.fixture(autouse=True)
def small_tiles():
    with tiles.use(tiles.Tile(16, 16, 4, 1)), nan_statistics():
        yield


def integers(*values):
    return torch.tensor(values)


def spread(tensor):
    """The tensor's numbers in every other column of a wider tensor."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), -1, dtype=tensor.dtype)
    return wide[..., ::2].copy_(tensor)


CASES = {
    "plain": (SHAPE | {"keys": 22, "audio": 17}, {}),
    # Shared rows, clips without readers, and one whose length ends a block.
    "index": (
        SHAPE | {"batch": 4, "heads": 2, "kv_heads": 1, "queries": 9, "keys": 20, "rows": 5},
        {"audio_index": integers(3, 1, 3, 3), "audio_lengths": integers(5, 16, 0, 33, 17)},
    ),
    "visible_from": (  # in the second row some tokens become visible after its last query only
        SHAPE,
        {"audio_visible_from": spread(integers(*INSERTED)), "softcap": 2.0, "text_end": integers(38, 27)},
    ),
    "late audio": (  # tokens of one position in whole blocks, so that later tiles of queries need no mask
        SHAPE,
        {
            "audio_visible_from": integers([30] * 16 + [33] * 16 + [2**40], [0] * 16 + [38] * 16 + [37]),
            "scale": 0.7,
        },
    ),
    "padding": (SHAPE, {"text_start": integers(13, 30), "text_end": integers(38, 24)}),
    "window": (SHAPE, {"window": 7, "text_end": integers(27, 38)}),
    "narrow": (SHAPE | {"keys": 11, "audio": 0}, {"window": 1}),
    "everything": (
        SHAPE | {"rows": 3},
        {
            "audio_index": spread(integers(2, 0)),
            "audio_lengths": spread(integers(33, 4, 20)),
            "audio_visible_from": spread(integers(*INSERTED)),
            "text_start": spread(integers(12, 20)),
            "text_end": spread(integers(30, 38)),
            "window": 9,
            "softcap": 2.0,
            "scale": 0.7,
        },
    ),
    "decoding": (SHAPE | {"queries": 1, "keys": 49}, {"text_start": integers(9, 17), "text_end": integers(40, 33)}),
}


def build(name, dtype=torch.float64, poison=True, **sizes) -> LalCase:
    shape, options = CASES[name]
    shape = shape | sizes
    rows = shape.pop("rows", None)
    features = () if rows is None else ("index",)
    case = lal_case(**shape, features=features, audio_rows=rows, dtype=dtype, seed=len(name), poison=poison)
    case.options.clear()
    case.options.update(options)
    return case


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name):
    """Output, LSE and five gradients in float64; all tensors have odd strides, and NaN beside them."""
    case = build(name)
    for which, got, want in zip(NAMES, attention(case, "triton"), attention(case, "reference"), strict=True):
        assert max_error(got, want) <= 1e-10, which


@pytest.mark.parametrize("name", ["index", "padding", "everything"])
@pytest.mark.parametrize("rows", [(16, 64), (64, 16)], ids=str)
def test_kernels_of_different_tiles(name, rows):
    """The queries' gradient writes each row's statistics where the keys' gradient reads them."""
    query, key = (tiles.Tile(block_m, 16, 4, 1) for block_m in rows)
    case = build(name)
    with tiles.use(query_gradient=query, key_gradient=key):
        got = attention(case, "triton")
    for which, mine, want in zip(NAMES, got, attention(case, "reference"), strict=True):
        assert max_error(mine, want) <= 1e-10, which


def test_large_scores():
    """The maximum moves from block to block, up and down, by more than an exponential without shift can hold."""
    case = build("plain", poison=False, batch=1, heads=3, kv_heads=1, keys=38, audio=33)
    _, key, _, audio_key, _ = case.tensors
    for keys, factors in ((audio_key, (300, 3000, 30)), (key, (1, 10_000, 100))):
        for block, factor in enumerate(factors):
            keys[:, :, 16 * block : 16 * block + 16] *= factor
    for which, got, want in zip(NAMES, attention(case, "triton"), attention(case, "reference"), strict=True):
        assert got.isfinite().all()
        assert max_error(got, want) <= 1e-9 * max(1, want.abs().max()), which


@pytest.mark.parametrize("name", ["index", "visible_from", "window"])
def test_what_no_query_sees_is_not_used(name):
    case = build(name, torch.float32, poison=False, heads=3, kv_heads=1)
    zeros = attention(fill_unreachable(case, 0.0), "triton")
    for which, got, want in zip(NAMES, attention(fill_unreachable(case, math.nan), "triton"), zeros, strict=True):
        assert torch.equal(got, want), which


@pytest.mark.parametrize("softcap", [1e-3, 1e6, 1e20])
def test_softcaps_of_any_size(softcap):
    """A large softcap changes nothing: tanh keeps its relative precision near zero."""
    case = build("plain", poison=False, batch=1, heads=3, kv_heads=1)
    case.options["softcap"] = softcap
    for which, got, want in zip(NAMES, attention(case, "triton"), attention(case, "reference"), strict=True):
        assert max_error(got, want) <= 1e-9, which


def test_blind_queries():
    """A query that sees nothing gets output 0, LSE -inf and gradients 0, whatever it holds, beside queries that see."""
    case = build("plain", torch.float32, poison=False, heads=3, kv_heads=1, keys=38)
    case.options.update(text_start=integers(32, 99), audio_lengths=integers(0, 0))
    blind = torch.ones(2, 3, 11, dtype=torch.bool)
    blind[0, :, 5:] = False
    results = []
    for fill in (0.0, math.nan):
        filled = (case.tensors[0].masked_fill(blind[..., None], fill), *case.tensors[1:])
        leaves = LalCase("", filled).requires_grad().tensors
        out, lse = lal_attention(*leaves, **case.options, return_lse=True, impl="triton")
        assert (out[blind] == 0).all()
        assert torch.equal(lse == -math.inf, blind)
        dout, dlse = (torch.ones_like(x) for x in (out, lse))
        dout[blind] = dlse[blind] = fill
        results.append(torch.autograd.grad([out, lse], leaves, [dout, dlse]))
    for which, got, want in zip(NAMES[2:], *results, strict=True):
        assert got.isfinite().all(), which
        assert torch.equal(got, want), which
    assert (results[0][0][blind] == 0).all()


def test_integers_out_of_bounds_are_clamped():
    """Integers out of bounds are clamped: on a GPU nothing looks at their values first."""
    case = build("index", torch.float64)
    audio, keys, queries = 33, 20, 9
    wrong = {
        "audio_lengths": integers(-7, 99, 16, 2**40, 33),
        "audio_index": integers(-3, 4, 77, 1),
        "audio_visible_from": integers([-(2**32) + 99, 2**40, 15] * 11, *[[12, -1, 3] * 11] * 3),
        "text_start": integers(-6, 2**40, 4, 0),
        "text_end": integers(14, 99, -5, 3),
    }
    right = wrong | {
        "audio_lengths": wrong["audio_lengths"].clamp(0, audio),
        "audio_index": wrong["audio_index"].clamp(0, 4),
        "text_start": wrong["text_start"].clamp(min=0),
        "text_end": wrong["text_end"].clamp(queries, keys),
    }
    for name in ("audio_lengths", "audio_visible_from"):  # each alone too: without the first, blocks are whole
        leaves = case.requires_grad()
        hidden = {key: value for key, value in right.items() if key != name}
        want_out, want_lse = lal_attention(*leaves.tensors, **hidden, scale=0.3, return_lse=True, impl="reference")
        given = [None if key == name else value for key, value in wrong.items()]
        out, lse = torch.ops.palkernels.lal_forward(*case.tensors, *given, 0.3, None, None)
        assert max_error(out, want_out) <= 1e-10
        assert max_error(lse, want_lse) <= 1e-10
        dout = torch.randn_like(out)
        arguments = (dout, None, out, lse, [True] * 5, *case.tensors, *given, 0.3, None, None)
        grads = torch.ops.palkernels.lal_backward(*arguments)
        want = torch.autograd.grad(want_out, leaves.tensors, dout)
        for which, x, y in zip(NAMES[2:], grads, want, strict=True):
            assert max_error(x, y) <= 1e-10, which


@pytest.mark.parametrize("dim", [20, 140])  # from 129 on, keys' and values' gradients take a launch each
def test_subsets_of_gradients(dim):
    """A subset of the gradients has the values that it has among all five, and nothing else is returned."""
    shape = SHAPE | {"batch": 1, "heads": 1, "kv_heads": 1, "queries": 3, "keys": 5, "audio": 4, "dim": dim}
    case = lal_case(**shape, dtype=torch.float64)
    every = dict(zip(NAMES[2:], attention(case, "reference")[2:], strict=True))
    for needed in [
        ("query",), ("key",), ("value",), ("audio_key",), ("audio_value",), ("query", "audio_value"),
        ("key", "audio_value"), ("value", "audio_key"), ("key", "value"), ("audio_key", "audio_value"), NAMES[2:],
    ]:  # fmt: skip
        leaves = [x.detach().requires_grad_(name in needed) for name, x in zip(NAMES[2:], case.tensors, strict=True)]
        out, lse = lal_attention(*leaves, return_lse=True, impl="triton")
        generator = torch.Generator().manual_seed(0)  # as kernel_runs.attention draws them
        douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse)]
        torch.autograd.backward([out, lse], douts)
        for name, leaf in zip(NAMES[2:], leaves, strict=True):
            if name in needed:
                assert max_error(leaf.grad, every[name]) <= 1e-10, (needed, name)
            else:
                assert leaf.grad is None, (needed, name)


def test_readers_beyond_one_scan():
    """audio_index is scanned 128 rows at a time, from the row after the last reader."""
    case = lal_case(
        batch=140, heads=1, kv_heads=1, queries=1, keys=1, audio=1, dim=1,
        features=("index",), audio_rows=4, dtype=torch.float64,
    )  # fmt: skip
    case.options["audio_index"] = integers(*[0] + [3] * 127, *[0, 0], *[3] * 9, 2)
    grads = []
    for impl in ("triton", "reference"):
        value = case.tensors[4].clone().requires_grad_()
        out = lal_attention(*case.tensors[:4], value, **case.options, impl=impl)
        grads.append(torch.autograd.grad(out.sum(), value)[0])
    assert max_error(*grads) <= 1e-10


FAR = 2**30 + 64  # twice this leaves 32 bits, but it does not itself: a stride that did would be passed in 64
FAR_STRIDES = {
    "batch": (FAR, 9, 3, 1),
    "head": (9, FAR, 3, 1),
    "token": (9, 3, FAR, 1),
    "dim": (9, 3, 1, FAR),
    "masked token": (9, 3, 2**28, 1),  # only lanes beyond the last token leave 32 bits
}


@pytest.fixture(params=["forward", "decode"])
def kernel(request, monkeypatch):
    """Few queries are decoded, unless they are told not to be."""
    if request.param == "forward":
        monkeypatch.setattr(decode, "MAX_QUERIES", 0)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", FAR_STRIDES)
def test_offsets_beyond_32_bits(name):
    """Each tensor in turn has one stride that takes its offsets beyond 2^31; only the pages touched are real."""
    batch, heads, tokens, dim = (1 if stride < 2**28 else 3 for stride in FAR_STRIDES[name])
    case = lal_case(
        batch=batch, heads=heads, kv_heads=heads, queries=tokens, keys=tokens, audio=tokens, dim=dim,
        dtype=torch.float16,
    )  # fmt: skip
    want = lal_attention(*case.tensors, return_lse=True, impl="triton")
    memory = torch.empty(2 * FAR + 64, dtype=torch.float16)
    for index in range(5):
        tensors = list(case.tensors)
        tensors[index] = memory.as_strided(tensors[index].shape, FAR_STRIDES[name]).copy_(tensors[index])
        with strict("cpu"):
            got = lal_attention(*tensors, return_lse=True, impl="triton")
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), NAMES[2 + index]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR)], ids=["batch", "token"])
def test_offsets_of_visible_from_beyond_32_bits(strides):
    case = lal_case(batch=3, heads=1, kv_heads=1, queries=3, keys=3, audio=3, dim=1)
    visible_from = torch.empty(2 * FAR + 3, dtype=torch.int32).as_strided((3, 3), strides)
    visible_from.copy_(integers([2, 1, 0], [3, 0, 2], [1, 2, 3]))
    want = lal_attention(*case.tensors, audio_visible_from=visible_from, impl="reference")
    with strict("cpu"):
        got = lal_attention(*case.tensors, audio_visible_from=visible_from, impl="triton")
    assert max_error(got, want) <= 1e-6


@pytest.mark.parametrize("upstream", ["out", "lse", "both"])
def test_upstream_gradients(upstream):
    """Upstream gradients of the output, of the LSE, or of both may have any strides."""
    shape = SHAPE | {"batch": 2, "heads": 2, "kv_heads": 1, "queries": 3, "keys": 5, "audio": 4}
    case = lal_case(**shape, dtype=torch.float64)
    dout = torch.randn(2, 3, 40, 2, dtype=torch.float64)[:, :, ::2].transpose(1, 3).transpose(2, 3)
    dlse = torch.randn(3, 2, 2, dtype=torch.float64).permute(1, 2, 0)
    grads = []
    for impl in ("triton", "reference"):
        leaves = case.requires_grad().tensors
        outputs = dict(zip(("out", "lse"), lal_attention(*leaves, return_lse=True, impl=impl), strict=True))
        given = {name: x for name, x in (("out", dout), ("lse", dlse)) if upstream in (name, "both")}
        # The values do not depend on an LSE by itself.
        grads.append(
            torch.autograd.grad([outputs[name] for name in given], leaves, list(given.values()), allow_unused=True)
        )
    for which, got, want in zip(NAMES[2:], *grads, strict=True):
        assert max_error(got, torch.zeros_like(got) if want is None else want) <= 1e-10, which


@pytest.mark.parametrize(("name", "dtype"), [("plain", torch.float16), ("visible_from", torch.float32)], ids=str)
def test_rounding(name, dtype):
    """Errors are those of eager PyTorch in the same dtype at most, times a factor that small samples need."""
    case = build(name, dtype, poison=False, heads=3, kv_heads=1)
    exact = attention(case.to(torch.float64), "reference")
    results = attention(case, "triton"), attention(case, "eager")
    for which, want, got, eager in zip(NAMES, exact, *results, strict=True):
        assert max_error(got, want) <= 3 * max_error(eager, want) + 1e-6, which


@pytest.mark.parametrize("scale", [0.0, -0.5, -40.0, 40.0])
@pytest.mark.parametrize("queries", [11, 2])
def test_a_scale_of_any_sign_and_size(scale, queries):
    """The softmax takes the maximum of the scores that a query sees, among keys that only some queries see."""
    case = lal_case(**SHAPE | {"queries": queries}, features=("lengths", "visible_from", "text_start"))
    case.options["scale"] = scale
    got = attention(case, "triton")
    for name, x, y in zip(NAMES, got, attention(case.to(torch.float64), "reference"), strict=True):
        assert max_error(x, y) <= 5e-5 * max(1.0, y[y.isfinite()].abs().max().item()), name
