"""Every invalid call raises, before anything runs, saying what must hold and what came."""

import pytest
import torch

from palkernels import lal_attention, unsupported_reasons
from palkernels.kernels.launch import Launch
from palkernels.kernels.tiles import Tile, use
from palkernels.testing import lal_case

NAMES = ("query", "key", "value", "audio_key", "audio_value")


def valid():
    """B 2, Hq 4, Hkv 2, T 3, S 5, A 2, N 4, D 8"""
    case = lal_case(batch=2, heads=4, kv_heads=2, queries=3, keys=5, audio=4, dim=8)
    return dict(zip(NAMES, case.tensors, strict=True))


def ints(*values):
    return torch.tensor(values)


INVALID = {
    "query not a tensor": ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    "lengths not a tensor": (
        {"audio_lengths": [4, 4]},
        TypeError,
        "audio_lengths must be a tensor, got list",
    ),
    "integer query": (
        {"query": torch.ones(2, 4, 3, 8).int()},
        TypeError,
        "query must be float16.*got torch.int32",
    ),
    "mixed dtypes": (
        {"key": torch.ones(2, 2, 5, 8).half()},
        TypeError,
        "must share one dtype, got .*key torch.float16",
    ),
    "float lengths": (
        {"audio_lengths": torch.ones(2)},
        TypeError,
        "audio_lengths must have an integer dtype",
    ),
    "bool index": (
        {"audio_index": torch.ones(2).bool()},
        TypeError,
        "audio_index must have an integer.*torch.bool",
    ),
    "other device": (
        {"key": torch.ones(2, 2, 5, 8, device="meta")},
        ValueError,
        "key must be on query's device cpu",
    ),
    "lengths' device": (
        {"audio_lengths": ints(1, 1).to("meta")},
        ValueError,
        "audio_lengths must be on query's device",
    ),
    "query rank": (
        {"query": torch.ones(4, 3, 8)},
        ValueError,
        r"query must be \(B, Hq, T, D\), got shape \(4, 3, 8\)",
    ),
    "head dims": (
        {"key": torch.ones(2, 2, 5, 4)},
        ValueError,
        r"key must be \(B, Hkv, S, D\).*got shape \(2, 2, 5, 4\)",
    ),
    "batches": ({"key": torch.ones(3, 2, 5, 8)}, ValueError, "key must be"),
    "value shape": ({"value": torch.ones(2, 2, 6, 8)}, ValueError, "value must be of key's shape"),
    "audio heads": ({"audio_key": torch.ones(2, 1, 4, 8)}, ValueError, "audio_key must be"),
    "audio value": (
        {"audio_value": torch.ones(2, 2, 3, 8)},
        ValueError,
        "audio_value must be of audio_key's shape",
    ),
    "head ratio": (
        {"query": torch.ones(2, 3, 3, 8)},
        ValueError,
        "Hq must be a multiple of Hkv, got Hq=3, Hkv=2",
    ),
    "S < T": ({"query": torch.ones(2, 4, 6, 8)}, ValueError, "S must be at least T, got S=5, T=6"),
    "A != B": (
        {"audio_key": torch.ones(3, 2, 4, 8), "audio_value": torch.ones(3, 2, 4, 8)},
        ValueError,
        "without audio_index, A must equal B, got A=3, B=2",
    ),
    "index shape": (
        {"audio_index": ints(0)},
        ValueError,
        r"audio_index must be \(B,\) = \(2,\), got shape \(1,\)",
    ),
    "lengths shape": ({"audio_lengths": ints(0, 1, 2)}, ValueError, r"audio_lengths must be \(A,\)"),
    "visible shape": (
        {"audio_visible_from": ints(0, 1)},
        ValueError,
        r"audio_visible_from must be \(B, N\) = \(2, 4\)",
    ),
    "start shape": ({"text_start": ints(0)}, ValueError, r"text_start must be \(B,\)"),
    "end shape": ({"text_end": ints(3)}, ValueError, r"text_end must be \(B,\)"),
    "length range": (
        {"audio_lengths": ints(4, 5)},
        ValueError,
        "audio_lengths must be 0 to N = 0 to 4, got .*4 to 5",
    ),
    "negative length": (
        {"audio_lengths": ints(-1, 4)},
        ValueError,
        "audio_lengths must be .* got values from -1 to 4",
    ),
    "index range": ({"audio_index": ints(0, 2)}, ValueError, "audio_index must be 0 to A - 1 = 0 to 1"),
    "negative start": (
        {"text_start": ints(0, -1)},
        ValueError,
        "text_start must be at least 0, got values from -1 to 0",
    ),
    "end below T": (
        {"text_end": ints(2, 5)},
        ValueError,
        "text_end must be T to S = 3 to 5, got values from 2 to 5",
    ),
    "end above S": ({"text_end": ints(3, 6)}, ValueError, "text_end must be T to S"),
    "scale type": ({"scale": "1"}, TypeError, "scale must be a number or None, got str"),
    "infinite scale": ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    "softcap sign": ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
    "window type": ({"window": 2.0}, TypeError, "window must be an int or None, got float"),
    "bool window": ({"window": True}, TypeError, "window must be an int or None, got bool"),
    "window range": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    "impl": (
        {"impl": "cuda"},
        ValueError,
        "impl must be one of 'auto', 'triton', 'sdpa', 'reference', got 'cuda'",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
@pytest.mark.parametrize("impl", ["auto", "sdpa", "triton", "reference"])
def test_invalid(change, error, message, impl, monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "run", launched.append)
    with pytest.raises(error, match=message):
        lal_attention(**(valid() | {"impl": impl} | change))
    assert not launched


def test_extremes_are_valid():
    lal_attention(
        **valid(),
        audio_lengths=ints(0, 4),
        audio_index=ints(1, 1),
        audio_visible_from=torch.tensor([[-5, 0, 100, 4]] * 2),
        text_start=ints(9, 0),
        text_end=ints(3, 5),
        window=1,
    )


@pytest.mark.parametrize("impl", ["sdpa", "triton", "reference"])
def test_huge_unsigned_positions_mean_never(impl):
    """2**64 - 1 is -1 as int64, which would mean always."""
    never = torch.full((2, 4), 2**64 - 1, dtype=torch.uint64)
    without = valid() | {name: valid()[name][:, :, :0] for name in ("audio_key", "audio_value")}
    got = lal_attention(**valid(), audio_visible_from=never, impl=impl)
    torch.testing.assert_close(got, lal_attention(**without, impl=impl))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("impl", ["sdpa", "triton", "reference"])
def test_any_integer_dtype(dtype, impl):
    integers = {"audio_lengths": ints(3, 1), "text_start": ints(1, 0), "text_end": ints(4, 5)}
    want = lal_attention(**valid(), **integers, impl=impl)
    got = lal_attention(**valid(), **{name: x.to(dtype) for name, x in integers.items()}, impl=impl)
    assert torch.equal(got, want)


def test_every_reason_at_once():
    arguments = {name: torch.ones(1, 2, 3, 512, dtype=torch.bfloat16) for name in NAMES}
    arguments["audio_lengths"] = torch.ones(2, dtype=torch.int64)
    reasons = unsupported_reasons(**arguments)
    for part in ("bfloat16", "D must be at most 256, got 512", "audio_lengths must be (A,)"):
        assert any(part in reason for reason in reasons)
    del arguments["audio_lengths"]
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: bfloat16.*512"):
        lal_attention(**arguments, impl="triton")


def test_reasons_include_invalid_arguments():
    arguments = valid() | {"audio_lengths": ints(1), "text_end": ints(3)}
    reasons = unsupported_reasons(**arguments, impl="sdpa")
    assert any("audio_lengths" in reason for reason in reasons)
    assert any("text_end" in reason for reason in reasons)


def test_no_reasons_for_what_runs():
    for impl in ("auto", "triton", "sdpa", "reference"):
        assert unsupported_reasons(**valid(), impl=impl) == []


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert any("CUDA device" in reason and "got cpu" in reason for reason in unsupported_reasons(**valid()))


def test_fake_tensors_take_the_triton_path():
    """No kernel runs for fake tensors: shapes, memory and FLOPs of the Triton path are to be had on any machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        given = {name: tensor.to(torch.bfloat16).requires_grad_() for name, tensor in valid().items()}
        assert unsupported_reasons(**given, impl="triton") == []
        out = lal_attention(**given, impl="triton")
        assert out.grad_fn.name() == "LalAttentionBackward"
        out.sum().backward()
        assert given["query"].grad.shape == (2, 4, 3, 8)
        wide = {name: tensor.new_empty(*tensor.shape[:-1], 300) for name, tensor in given.items()}
        assert unsupported_reasons(**wide, impl="triton") == ["D must be at most 256, got 300"]


def test_values_are_not_read_while_tracing():
    """A fake tensor, which has no values, passes the checks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = lal_attention(**valid(), audio_lengths=torch.ones(2, dtype=torch.int64))
    assert out.shape == (2, 4, 3, 8)


@pytest.mark.parametrize("size", [8, 48, 2048])
def test_tiles_have_sizes_that_kernels_take(size):
    with pytest.raises(ValueError, match=f"block_n must be a power of two from 16 to 1024, got {size}"):
        Tile(64, size, 4, 2)
    with (
        pytest.raises(ValueError, match="among forward, decode, query_gradient, key_gradient, got merge"),
        use(merge=Tile(16, 16, 4, 1)),
    ):
        pass
