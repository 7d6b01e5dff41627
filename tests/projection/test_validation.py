"""Every invalid call of audio_kv raises, saying what must hold and what came."""

import pytest
import torch
from support.projection_cases import EVERYTHING, arguments, layers_of

from palkernels import audio_kv


def replaced(**changes):
    tensors, numbers = arguments("k_bias", "rope", "k_norm_weight")
    return tensors | numbers | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"states": torch.randn(3, 24)}, ValueError, r"states must be \(A, N, d\), got shape \(3, 24\)"),
        ({"states": [1.0]}, TypeError, "states must be a tensor, got list"),
        ({"states": torch.ones(2, 37, 24).long()}, TypeError, "states must be float16, .* got torch.int64"),
        ({"norm_weight": torch.ones(23)}, ValueError, r"norm_weight must be \(d,\) = \(24,\), got shape \(23,\)"),
        ({"norm_weight": None}, TypeError, "norm_weight must be a tensor, got NoneType"),
        ({"k_weight": torch.ones(20, 23)}, ValueError, r"k_weight must be \(Hkv \* D, d\) with states' d = 24"),
        ({"k_weight": torch.ones(21, 24)}, ValueError, "k_weight must have a multiple of num_kv_heads = 2 rows"),
        ({"v_weight": torch.ones(10, 24)}, ValueError, r"v_weight must be of k_weight's shape = \(20, 24\)"),
        ({"v_weight": torch.ones(20, 24).half()}, TypeError, "v_weight must have states' dtype torch.float32"),
        ({"k_bias": torch.ones(10)}, ValueError, r"k_bias must be \(Hkv \* D,\) = \(20,\), got shape \(10,\)"),
        ({"k_norm_weight": torch.ones(20)}, ValueError, r"k_norm_weight must be \(D,\) = \(10,\)"),
        ({"cos": None}, TypeError, "cos and sin must both be given or both be None"),
        ({"cos": torch.ones(37, 5), "sin": torch.ones(37, 5)}, ValueError, r"cos must be .* R even, at most D = 10"),
        ({"cos": torch.ones(36, 10), "sin": torch.ones(36, 10)}, ValueError, r"cos must be \(N, R\) or \(A, N, R\)"),
        ({"cos": torch.ones(37, 8)}, ValueError, r"cos and sin must have one shape, got \(37, 8\) and \(37, 10\)"),
        ({"cos": torch.ones(37, 10, requires_grad=True)}, ValueError, "cos must not require gradients"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads must be an int, got float"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"eps": -1e-6}, ValueError, "eps must be finite and at least 0, got -1e-06"),
        ({"eps": "small"}, TypeError, "eps must be a number, got str"),
        ({"norm_offset": float("nan")}, ValueError, "norm_offset must be finite, got nan"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"k_weight": []}, ValueError, "k_weight must hold at least one layer"),
        ({"k_weight": [torch.ones(20, 24)]}, TypeError, "norm_weight must be a list, as k_weight is, got Tensor"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_refused(changes, error, message):
    with pytest.raises(error, match=message):
        audio_kv(**replaced(**changes))


def test_refused_lists_name_the_layer():
    tensors, numbers = layers_of(2)
    with pytest.raises(ValueError, match=r"norm_weight must have an entry for each of k_weight's 2 layers, got 1"):
        audio_kv(**tensors | {"norm_weight": tensors["norm_weight"][:1]}, **numbers)
    tensors["v_weight"][1] = torch.ones(4, 24)
    with pytest.raises(ValueError, match=r"v_weight\[1\] must be of k_weight's shape"):
        audio_kv(**tensors, **numbers)


def test_triton_says_why_it_cannot_run():
    tensors, numbers = arguments(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="impl='triton' cannot run: bfloat16 must not be used"):
        audio_kv(**tensors, **numbers, impl="triton")


def test_auto_is_the_portable_path_on_a_cpu():
    tensors, numbers = arguments(*EVERYTHING)
    for got, want in zip(audio_kv(**tensors, **numbers), audio_kv(**tensors, **numbers, impl="sdpa"), strict=True):
        assert torch.equal(got, want)
