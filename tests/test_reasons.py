"""unsupported_reasons of each public function: none for what runs, otherwise all that the function would raise."""

import pytest
import torch

from palkernels import audio_kv, lal_attention, lal_attention_varlen, unsupported_reasons

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "reference")


def ints(*values):
    return torch.tensor(values)


def dense():
    """B 2, Hq 4, Hkv 2, T 3, S 5, A 2, N 4, D 8"""
    shapes = {"query": (2, 4, 3, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 8)}
    shapes |= {"audio_key": (2, 2, 4, 8), "audio_value": (2, 2, 4, 8)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def packed():
    """Rows of 2 and 3 tokens, clips of 4 and 3"""
    shapes = {
        "query": (5, 4, 8),
        "key": (5, 2, 8),
        "value": (5, 2, 8),
        "audio_key": (7, 2, 8),
        "audio_value": (7, 2, 8),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return tensors | {"cu_seqlens": ints(0, 2, 5), "cu_audio": ints(0, 4, 7), "max_seqlen": 3, "max_audio": 4}


def projection():
    """A 2, N 5, d 12, Hkv 2, D 4"""
    tensors = {"states": torch.randn(2, 5, 12), "norm_weight": torch.randn(12)}
    return tensors | {"k_weight": torch.randn(8, 12), "v_weight": torch.randn(8, 12), "num_kv_heads": 2, "eps": 1e-5}


def layers():
    """Three layers' weights at once"""
    one = projection()
    return one | {name: [one[name]] * 3 for name in ("norm_weight", "k_weight", "v_weight")}


VALID = {
    "dense": (lal_attention, dense),
    "packed": (lal_attention_varlen, packed),
    "projection": (audio_kv, projection),
    "layers": (audio_kv, layers),
}


@pytest.mark.parametrize(("function", "valid"), VALID.values(), ids=VALID)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_none_for_what_runs(impl, function, valid):
    assert unsupported_reasons(**valid(), impl=impl) == []
    function(**valid(), impl=impl)


def marked(change=lambda audio: audio):
    """K and V of ``audio_kv(recompute=True)``, as the dense call takes them, or what ``change`` makes of them."""
    audio = audio_kv(**projection() | {"states": torch.randn(2, 4, 12), "num_kv_heads": 1}, recompute=True)
    rest = {name: torch.randn(2, 1, 5, 8) for name in ("key", "value")}
    return rest | dict(zip(("audio_key", "audio_value"), map(change, audio), strict=True))


def half_of(arguments):
    return {name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}


# What is changed, and a part of each reason that must be named.
FAULTY = {
    "dense values": (dense, {"audio_lengths": ints(9, 9), "text_end": ints(9, 9)}, ["audio_lengths", "text_end"]),
    "dense shapes": (
        dense,
        {"key": torch.ones(2, 3, 5, 8), "audio_lengths": ints(1)},
        ["key's shape", "audio_key", "multiple of Hkv", "audio_lengths"],
    ),
    "dense types": (dense, {"query": [1.0], "audio_index": [0]}, ["query must be a tensor", "audio_index must be"]),
    "view of recomputed": (dense, marked(lambda audio: audio[:]), ["audio_key must be", "audio_value must be"]),
    "packed values": (
        packed,
        {"cu_seqlens": ints(0, 2, 4), "max_audio": 1},
        ["cu_seqlens must run from 0", "max_audio must be at least"],
    ),
    "packed shapes": (
        packed,
        {"value": torch.ones(5, 1, 8), "audio_key": torch.ones(6, 2, 8)},
        ["value must be of key's shape", "audio_value must be of audio_key's"],
    ),
    "packed types": (packed, {"max_seqlen": 3.0, "max_audio": -1}, ["max_seqlen must be an int", "max_audio must be"]),
    "projection": (
        projection,
        {"eps": -1.0, "num_kv_heads": 0, "cos": torch.ones(5, 4)},
        ["eps must be", "num_kv_heads must be at least 1", "cos and sin must both"],
    ),
    "projection shapes": (
        projection,
        {"norm_weight": torch.ones(3), "v_weight": torch.ones(4, 12), "k_bias": torch.ones(2)},
        ["norm_weight must be (d,)", "v_weight must be of k_weight's shape", "k_bias must be"],
    ),
    "layers": (
        layers,
        {"norm_weight": torch.ones(12), "v_weight": [torch.ones(8, 12)], "norm_offset": "1"},
        ["norm_weight must be a list", "v_weight must have an entry for each", "norm_offset must be a number"],
    ),
    "a layer": (
        layers,
        {"v_weight": [torch.ones(8, 12), torch.ones(4, 12), torch.ones(8, 11)]},
        ["v_weight[1] must be of k_weight's", "v_weight[2] must be of k_weight's"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("valid", "changes", "parts"), FAULTY.values(), ids=FAULTY)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_every_fault_is_named(impl, valid, changes, parts):
    reasons = unsupported_reasons(**valid() | changes, impl=impl)
    for part in parts:
        assert any(part in reason for reason in reasons), (part, reasons)
    function = next(function for function, made in VALID.values() if made is valid)
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**valid() | changes, impl=impl)
    assert str(caught.value) == "; ".join(reasons)


@pytest.mark.parametrize("valid", [dense, packed, projection, layers])
def test_faults_and_triton_at_once(valid):
    """bfloat16 is none for the interpreter; an argument is wrong as well."""
    arguments = half_of(valid())
    if valid is layers:
        arguments |= {name: [x.bfloat16() for x in arguments[name]] for name in ("norm_weight", "k_weight", "v_weight")}
    (only,) = unsupported_reasons(**arguments)
    assert "bfloat16" in only
    wrong = {"dense": {"window": 0}, "packed": {"window": 0}}.get(valid.__name__, {"eps": -1.0})
    first, *rest = unsupported_reasons(**arguments | wrong)
    assert "must be" in first
    assert rest == [only]
    assert unsupported_reasons(**arguments, impl="sdpa") == []


def test_sizes_that_triton_does_not_take():
    tensors = {name: torch.ones(1, 1, 1, 300) for name in dense()}
    assert unsupported_reasons(**tensors) == ["D must be at most 256, got 300"]
    flat = {name: torch.ones(1, 1, 300) for name in dense()}
    packing = {"cu_seqlens": ints(0, 1), "cu_audio": ints(0, 1), "max_seqlen": 1, "max_audio": 1}
    assert unsupported_reasons(**flat, **packing) == ["D must be at most 256, got 300"]
    assert "D must be at most 256, got 300" in unsupported_reasons(**flat, **packing | {"max_audio": 0})
    wide = {"states": torch.ones(1, 1, 65_537), "norm_weight": torch.ones(65_537)}
    weight = torch.ones(1, 65_537).expand(1026, -1)
    wide |= {"k_weight": weight, "v_weight": weight, "num_kv_heads": 1, "eps": 1e-5}
    reasons = ["d must be at most 65536, got 65537", "D must be at most 1024, got 1026"]
    assert unsupported_reasons(**wide) == reasons
    assert unsupported_reasons(**wide | {"eps": -1.0})[1:] == reasons


def test_tangents_are_a_reason_of_triton():
    reasons = []

    def run(query):
        reasons.extend(unsupported_reasons(**dense() | {"query": query}))
        return query

    query = dense()["query"]
    torch.func.jvp(run, (query,), (query,))
    assert len(reasons) == 1
    assert "forward-mode tangents" in reasons[0]


def test_other_keywords_raise_as_in_any_call():
    with pytest.raises(TypeError, match="unexpected keyword argument 'lengths'"):
        unsupported_reasons(**dense(), lengths=ints(1, 1))
    with pytest.raises(TypeError, match="unexpected keyword argument 'text_start'"):
        unsupported_reasons(**packed(), text_start=ints(1, 1))
    with pytest.raises(TypeError, match="unexpected keyword argument 'window'"):
        unsupported_reasons(**projection(), window=1)
    with pytest.raises(TypeError, match=r"missing a required .*argument: 'audio_value'"):
        unsupported_reasons(*list(dense().values())[:4])
    with pytest.raises(TypeError, match=r"missing a required .*argument: 'eps'"):
        unsupported_reasons(**{name: x for name, x in projection().items() if name != "eps"})
    with pytest.raises(ValueError, match="impl must be one of"):
        unsupported_reasons(**dense(), impl="cuda")
