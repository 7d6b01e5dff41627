"""Packed rows: equal to the definition, and to the same rows with padding, forward and backward."""

import math

import pytest
import torch
from support import interpreter
from support.kernel_runs import nan_statistics, strict
from torch.utils.flop_counter import FlopCounterMode

from palkernels import lal_attention, lal_attention_varlen
from palkernels.kernels import tiles
from palkernels.kernels.launch import Launch
from palkernels.testing import max_error

TEXTS, AUDIOS = (5, 0, 23, 1), (33, 7, 0, 16)
OPTIONS = {
    "plain": {},
    "index": {"audio_index": torch.tensor([1, 3, 1, 0])},
    "visible_from": {"audio_visible_from": torch.arange(56) * 7 % 26},
    "everything": {"audio_visible_from": torch.arange(56) * 5 % 26, "window": 4, "softcap": 2.0, "scale": 0.7},
}
NAMES = ("out", "lse", "query", "key", "value", "audio_key", "audio_value")


def tensors(dtype=torch.float64, texts=TEXTS, audios=AUDIOS, heads=6, kv_heads=2, dim=20):
    """The five packed tensors, leaves within memory that is NaN elsewhere."""
    generator = torch.Generator().manual_seed(1)

    def leaf(tokens, heads):
        parent = torch.full((tokens + 4, heads + 1, dim + 1), math.nan, dtype=dtype)
        view = parent[2 : tokens + 2, :heads, :dim]
        return view.copy_(torch.randn(view.shape, generator=generator, dtype=torch.float64)).requires_grad_()

    text, audio = sum(texts), sum(audios)
    return [leaf(text, heads), leaf(text, kv_heads), leaf(text, kv_heads), leaf(audio, kv_heads), leaf(audio, kv_heads)]


def packing(texts=TEXTS, audios=AUDIOS):
    cumulative = [torch.tensor([0, *x]).cumsum(0) for x in (texts, audios)]
    return dict(zip(("cu_seqlens", "cu_audio"), cumulative, strict=True)) | {
        "max_seqlen": max(texts, default=0), "max_audio": max(audios, default=0),
    }  # fmt: skip


def results(impl, options, device="cpu", **shape):
    leaves = [x.detach().to(device).requires_grad_() if device != "cpu" else x for x in tensors(**shape)]
    sizes = {name: shape[name] for name in ("texts", "audios") if name in shape}
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in (packing(**sizes) | options).items()
    }
    out, lse = lal_attention_varlen(*leaves, **options, return_lse=True, impl=impl)
    assert out.is_contiguous()
    generator = torch.Generator().manual_seed(0)
    douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse)]
    grads = torch.autograd.grad([out, lse.masked_fill(lse == -math.inf, 0)], leaves, douts, materialize_grads=True)
    return dict(zip(NAMES, [out, lse, *grads], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_against_the_definition(impl, name, device):
    dtype, bound = (torch.float64, 1e-10) if device == "cpu" else (torch.float32, 1e-4)
    small = tiles.Tile(16, 16, 4, 1)
    with tiles.use(small, key_gradient=tiles.Tile(32, 16, 4, 1)), nan_statistics():
        got = results(impl, OPTIONS[name], device, dtype=dtype)
    want = results("reference", OPTIONS[name], device)
    for which in NAMES:
        assert max_error(got[which], want[which]) <= bound, which


def test_definition_equals_padded_rows():
    """The definition of packed rows is the dense definition on padded tensors, row by row."""
    leaves = [x.detach() for x in tensors()]
    options = OPTIONS["everything"]
    out, lse = lal_attention_varlen(*leaves, **packing(), **options, return_lse=True, impl="reference")
    numbers = {name: options[name] for name in ("window", "softcap", "scale")}

    def padded(tensor, lengths, longest):
        rows = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, longest - len(x))) for x in tensor.split(lengths)]
        return torch.stack(rows).transpose(1, 2)

    dense = [padded(x, TEXTS, 23) for x in leaves[:3]] + [padded(x, AUDIOS, 33) for x in leaves[3:]]
    visible = [torch.nn.functional.pad(x, (0, 33 - len(x))) for x in options["audio_visible_from"].split(AUDIOS)]
    want, want_lse = lal_attention(
        *dense, audio_lengths=torch.tensor(AUDIOS), audio_visible_from=torch.stack(visible), **numbers,
        return_lse=True, impl="reference",
    )  # fmt: skip
    want = torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(want, TEXTS, strict=True)])
    want_lse = torch.cat([row[:, :length] for row, length in zip(want_lse, TEXTS, strict=True)], dim=1)
    assert max_error(out, want) <= 1e-12
    assert max_error(lse, want_lse) <= 1e-12


@pytest.mark.parametrize(("texts", "audios"), [((), ()), ((0,), (0,)), ((4, 3), (0, 0)), ((0, 0), (3, 2))], ids=str)
@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_nothing_to_attend_to(impl, texts, audios):
    got = results(impl, {}, texts=texts, audios=audios)
    assert got["out"].shape == (sum(texts), 6, 20)
    want = results("reference", {}, texts=texts, audios=audios)
    for which in NAMES:
        assert got[which].shape == want[which].shape
        assert max_error(got[which], want[which]) <= 1e-10, which


@pytest.mark.parametrize("name", ["index", "everything"])
def test_operators(name):
    """opcheck passes: schema, fake tensors, autograd registration, AOTAutograd with dynamic shapes."""
    arguments = operator_arguments(tensors(torch.float32), OPTIONS[name])
    forward, backward = torch.ops.palkernels.lal_forward.default, torch.ops.palkernels.lal_backward.default
    torch.library.opcheck(forward, arguments)
    detached = operator_arguments([x.detach() for x in tensors(torch.float32)], OPTIONS[name])
    out, lse = forward(*detached)
    torch.library.opcheck(backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, [True] * 5, *detached))


def operator_arguments(leaves, options):
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in leaves]
    visible_from = options.get("audio_visible_from")
    integers = [None, options.get("audio_index"), None if visible_from is None else visible_from[None], None, None]
    numbers = [options.get(name, default) for name, default in (("scale", 0.3), ("softcap", None), ("window", None))]
    return (*heads_first, *integers, *numbers, *packing().values())


def test_compiled_is_one_graph():
    def function(cu_seqlens, cu_audio, *leaves):
        cumulative = {"cu_seqlens": cu_seqlens, "cu_audio": cu_audio}
        return lal_attention_varlen(*leaves, **packing() | cumulative, window=4, impl="triton")

    cumulative = [packing()[name] for name in ("cu_seqlens", "cu_audio")]
    results = []
    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = tensors(torch.float32)
        out = each(*cumulative, *leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for eager, got in zip(*results, strict=True):
        assert max_error(got, eager) <= 1e-6


def test_flops():
    """The FLOPs are those of the rows as they are, not of the longest row as often as there are rows."""
    leaves = tensors(torch.float32)

    def count(options):
        with FlopCounterMode(display=False) as counter:
            out = lal_attention_varlen(*leaves, **packing(), **options, impl="triton")
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out.sum(), leaves)
        return forward, counter.get_total_flops()

    product = 2 * 6 * 20
    text = sum(length * (length + 1) // 2 for length in TEXTS)
    audio = sum(length * tokens for length, tokens in zip(TEXTS, AUDIOS, strict=True))
    assert count({}) == (2 * product * (text + audio), 5 * product * (text + audio))
    shared = sum(length * AUDIOS[row] for length, row in zip(TEXTS, (1, 3, 1, 0), strict=True))
    assert count(OPTIONS["index"])[0] == 2 * product * (text + shared)


def test_saves_inputs_output_and_lse_only():
    leaves = tensors(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = lal_attention_varlen(*leaves, **packing(), return_lse=True, impl="triton")
    floats = [x for x in saved if x.is_floating_point()]
    assert {x.untyped_storage().data_ptr() for x in floats} == {
        x.untyped_storage().data_ptr() for x in (*leaves, out, lse)
    }
    assert sum(x.numel() for x in floats) == sum(x.numel() for x in (*leaves, out, lse))


def test_boundaries_out_of_bounds_are_clamped():
    """On a GPU nobody looks at them first: what is left of each row is computed, nothing else is read or written."""
    leaves = [x.detach() for x in tensors()]
    wrong = {"cu_seqlens": torch.tensor([-3, 5, 5, 28, 99]), "cu_audio": torch.tensor([0, 33, 40, 2**40, 56])}
    right = {"cu_seqlens": torch.tensor([0, 5, 5, 28, 29]), "cu_audio": torch.tensor([0, 33, 40, 56, 56])}
    longest = {"max_seqlen": 23, "max_audio": 33}
    want = lal_attention_varlen(*leaves, **right, **longest, impl="reference")
    arguments = operator_arguments(leaves, {"scale": 20**-0.5})[: -len(packing())]
    out, _ = torch.ops.palkernels.lal_forward(*arguments, *wrong.values(), *longest.values())
    assert max_error(out[0].transpose(0, 1), want) <= 1e-10


def test_offsets_beyond_32_bits():
    """A row's first token times its stride passes 2^31; only the pages touched are real."""
    far = 2**30 + 64
    leaves = [x.detach() for x in tensors(torch.float16, (2, 1), (2, 1), heads=1, kv_heads=1, dim=1)]
    arguments = packing((2, 1), (2, 1))
    want = lal_attention_varlen(*leaves, **arguments, return_lse=True, impl="triton")
    memory = torch.empty(2 * far + 1, dtype=torch.float16)
    for index in range(5):
        moved = list(leaves)
        moved[index] = memory.as_strided((3, 1, 1), (far, 1, 1)).copy_(leaves[index])
        with strict("cpu"):
            got = lal_attention_varlen(*moved, **arguments, return_lse=True, impl="triton")
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), NAMES[2 + index]


@pytest.mark.parametrize("name", ["plain", "index"])
def test_programs_may_run_in_any_order(name):
    """Programs in any order give the same bits: none writes what belongs to another row."""
    want = results("triton", OPTIONS[name])
    with interpreter.in_order(reversed):
        got = results("triton", OPTIONS[name])
    for which in NAMES:
        assert torch.equal(got[which], want[which]), which


INVALID = {
    "rank": ({"query": torch.ones(1, 29, 6, 20)}, ValueError, r"query must be \(sum T, Hq, D\), got shape \(1, 29"),
    "tokens": ({"key": torch.ones(30, 2, 20)}, ValueError, r"key must be \(sum T, Hkv, D\) with query's tokens and D"),
    "value": ({"value": torch.ones(30, 2, 20)}, ValueError, "value must be of key's shape"),
    "audio key": ({"audio_key": torch.ones(56, 1, 20)}, ValueError, "audio_key must be .*key's Hkv"),
    "audio value": ({"audio_value": torch.ones(55, 2, 20)}, ValueError, "audio_value must be of audio_key's shape"),
    "heads": ({"query": torch.ones(29, 5, 20)}, ValueError, "Hq must be a multiple of Hkv, got Hq=5, Hkv=2"),
    "dtype": ({"key": torch.ones(29, 2, 20).half()}, TypeError, "must share one dtype"),
    "no cu_seqlens": ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a tensor, got NoneType"),
    "no cu_audio": ({"cu_audio": None}, TypeError, "cu_audio must be a tensor, got NoneType"),
    "float cu_seqlens": ({"cu_seqlens": torch.ones(5)}, TypeError, "cu_seqlens must have an integer dtype"),
    "empty cu_audio": (
        {"cu_audio": torch.ones(0).int()},
        ValueError,
        r"cu_audio must be \(A \+ 1,\), got shape \(0,\)",
    ),
    "begins late": ({"cu_seqlens": torch.tensor([1, 5, 5, 28, 29])}, ValueError, "from 0 to sum T = 29, got 1 to 29"),
    "ends early": ({"cu_audio": torch.tensor([0, 33, 40, 40, 55])}, ValueError, "from 0 to sum N = 56, got 0 to 55"),
    "decreases": ({"cu_seqlens": torch.tensor([0, 5, 4, 28, 29])}, ValueError, "must not decrease, got a row of -1"),
    "too long": ({"max_seqlen": 22}, ValueError, "max_seqlen must be at least the longest row's 23, got 22"),
    "audio too long": ({"max_audio": 1}, ValueError, "max_audio must be at least the longest row's 33, got 1"),
    "float length": ({"max_audio": 33.0}, TypeError, "max_audio must be an int, got float"),
    "negative length": ({"max_seqlen": -1}, ValueError, "max_seqlen must be at least 0, got -1"),
    "rows": ({"cu_audio": torch.tensor([0, 56])}, ValueError, "without audio_index, A must equal B, got A=1, B=4"),
    "index shape": ({"audio_index": torch.tensor([0])}, ValueError, r"audio_index must be \(B,\) = \(4,\)"),
    "index range": ({"audio_index": torch.tensor([0, 1, 2, 4])}, ValueError, "0 to A - 1 = 0 to 3, got .* 0 to 4"),
    "both": (
        {"audio_index": torch.tensor([0, 1, 2, 3]), "audio_visible_from": torch.zeros(56).int()},
        ValueError,
        "audio_visible_from must not be given with audio_index",
    ),
    "visible_from": ({"audio_visible_from": torch.zeros(4).int()}, ValueError, r"must be \(sum N,\) = \(56,\)"),
    "impl": ({"impl": "flash"}, ValueError, "impl must be one of"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_invalid(change, error, message, impl, monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "run", launched.append)
    names = ("query", "key", "value", "audio_key", "audio_value")
    arguments = dict(zip(names, tensors(torch.float32), strict=True)) | packing() | {"impl": impl} | change
    with pytest.raises(error, match=message):
        lal_attention_varlen(**arguments)
    assert not launched
