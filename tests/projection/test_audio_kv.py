"""audio_kv of one layer against its definition: values and gradients, in every dtype, of any sizes and strides."""

import pytest
import torch
from support import interpreter
from support.kernel_runs import arithmetic
from support.projection_cases import EVERYTHING, FEATURES, arguments, assert_close, in_float64, leaves, results

from palkernels import audio_kv, reference
from palkernels.arguments import Projection
from palkernels.testing import max_error


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(), *[(x,) for x in FEATURES], EVERYTHING], ids=lambda x: "-".join(x) or "plain")
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_against_the_definition(device, impl, features):
    """Both paths are near the definition in strict IEEE float32, at dimensions that divide no block."""
    tensors, numbers = arguments(*features, device=device)
    assert_close(results(tensors, numbers, impl), results(in_float64(tensors), numbers, "reference"), 5e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "tokens", "width", "heads", "dim"), [(1, 1, 1, 1, 2), (3, 70, 200, 3, 64), (2, 33, 64, 1, 7)]
)
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_sizes(device, impl, rows, tokens, width, heads, dim):
    features = ("k_norm_weight", *["rope"] * (dim % 2 == 0))
    sizes = {"rows": rows, "tokens": tokens, "width": width, "heads": heads, "dim": dim}
    tensors, numbers = arguments(*features, **sizes, device=device)
    assert_close(results(tensors, numbers, impl), results(in_float64(tensors), numbers, "reference"), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_half_precision(device, impl, dtype):
    """Results are within a few roundings of the definition, also where large states would overflow their products."""
    tensors, numbers = arguments(*EVERYTHING, width=64, dtype=dtype, device=device)
    with torch.no_grad():
        tensors["states"].mul_(1000.0)
    if dtype == torch.bfloat16 and device == "cpu" and impl == "triton":
        pytest.skip("refused by the interpreter")
    bound = 16 * torch.finfo(dtype).eps
    assert_close(results(tensors, numbers, impl)[:2], results(in_float64(tensors), numbers, "reference")[:2], bound)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize(
    "features",
    [(), EVERYTHING, pytest.param(("partial_rope", "k_norm_weight"), marks=pytest.mark.slow)],
    ids=len,
)
def test_gradcheck(impl, features):
    tensors, numbers = arguments(*features, rows=1, tokens=3, width=5, heads=2, dim=6, dtype=torch.float64)

    def run(*values):
        return audio_kv(**dict(zip(tensors, values, strict=True)), **numbers, impl=impl)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_any_strides_and_nothing_beyond(device, impl):
    tensors, numbers = arguments(*EVERYTHING, device=device, poison=True)
    assert not any(x.is_contiguous() for x in tensors.values())
    assert_close(results(tensors, numbers, impl), results(in_float64(tensors), numbers, "reference"), 5e-6)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_upstream_gradients_of_any_strides(impl):
    tensors, numbers = arguments("rope", "k_norm_weight")
    key, value = audio_kv(**tensors, **numbers, impl=impl)
    for layout in (torch.randn_like(key), torch.randn(key.shape), torch.randn(1, 1, 1, 1).expand(key.shape)):
        got = torch.autograd.grad((key, value), leaves(tensors), (layout, layout), retain_graph=True)
        dense = layout.clone(memory_format=torch.contiguous_format)
        want = torch.autograd.grad((key, value), leaves(tensors), (dense, dense), retain_graph=True)
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_keys_or_values_alone(impl, used):
    tensors, numbers = arguments(*EVERYTHING)
    wide = in_float64(tensors)
    got = audio_kv(**tensors, **numbers, impl=impl)[used]
    want = audio_kv(**wide, **numbers, impl="reference")[used]
    dout = torch.randn_like(want)
    found = torch.autograd.grad(got, leaves(tensors), dout.float(), materialize_grads=True)
    assert_close(found, torch.autograd.grad(want, leaves(wide), dout, materialize_grads=True), 5e-6)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("needed", ["states", "norm_weight", "k_weight", "v_bias", "k_norm_weight"])
def test_a_gradient_alone(impl, needed):
    tensors, numbers = arguments(*EVERYTHING)
    want = dict(
        zip([n for n, x in tensors.items() if x.requires_grad], results(tensors, numbers, impl)[2:], strict=True)
    )
    alone = {name: x.detach().requires_grad_(name == needed) for name, x in tensors.items()}
    assert_close(results(alone, numbers, impl)[2:], [want[needed]], 1e-6)


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize(("rows", "tokens"), [(0, 4), (2, 0)])
def test_no_audio(impl, rows, tokens):
    tensors, numbers = arguments(*EVERYTHING, rows=rows, tokens=tokens)
    key, value, *gradients = results(tensors, numbers, impl)
    assert key.shape == value.shape == (rows, 2, tokens, 10)
    assert all(not x.any() for x in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_keys_lie_as_attention_reads_them(device, impl):
    tensors, numbers = arguments(*EVERYTHING, device=device)
    for x in audio_kv(**tensors, **numbers, impl=impl):
        assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_norms_and_rope_may_stay_in_float32(impl):
    tensors, numbers = arguments(*EVERYTHING, dtype=torch.float16)
    for name in ("norm_weight", "k_norm_weight", "cos", "sin"):
        tensors[name] = tensors[name].detach().float().requires_grad_(name.endswith("weight"))
    found = results(tensors, numbers, impl)
    assert [x.dtype for x in found[:2]] == [torch.float16] * 2
    assert [x.dtype for x in found[2:]] == [x.dtype for x in leaves(tensors)]
    assert_close(found, results(in_float64(tensors), numbers, "reference"), 2e-2)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_autocast(impl):
    tensors, numbers = arguments(*EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(tensors, numbers, impl)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2 + [torch.float32] * len(leaves(tensors))
    assert_close(found[:2], results(in_float64(tensors), numbers, "reference")[:2], 4e-2)


@pytest.mark.parametrize("seed", range(3))
def test_no_integer_overflows(seed):
    tensors, numbers = arguments(*EVERYTHING, rows=2, tokens=40 + seed, seed=seed)
    with interpreter.overflow_checks():
        results(tensors, numbers, "triton")


def test_bfloat16_steps_in_the_interpreter():
    """The kernels and what defines them round once, from float32."""
    from palkernels.kernels import projection as kernels
    from palkernels.projection import steps

    dtype = torch.bfloat16
    tensors, numbers = arguments(*EVERYTHING, dtype=dtype)
    tensors = {name: x.detach() for name, x in tensors.items()}
    layer = Projection(**tensors, **numbers)
    keys, dkeys = torch.randn(2, 2, 37, 2, 10).to(dtype).unbind(0)
    finished, want = keys.clone(), keys.clone()
    with arithmetic(dtype, "cpu"):
        got = kernels.normalise(layer, layer.norm_weight)
        kernels.finish_keys(finished, layer)
        back, _ = kernels.finish_gradient(dkeys, keys, layer)
    steps.finish_keys(want, layer)
    assert_close(
        [got, finished, back],
        [steps.normalise(layer, layer.norm_weight), want, steps.finish_gradient(dkeys, keys, layer)[0]],
        torch.finfo(dtype).eps,
    )


def test_the_definition_is_what_a_decoder_layer_does():
    """Llama's own norm and projections, and Qwen3's head norm, rotated by their own function."""
    from transformers import Qwen3Config
    from transformers.models.qwen3 import modeling_qwen3 as qwen

    config = Qwen3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=8,
        num_hidden_layers=1, vocab_size=7,
    )  # fmt: skip
    layer, rotary = qwen.Qwen3DecoderLayer(config, 0).double(), qwen.Qwen3RotaryEmbedding(config)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    states = torch.randn(2, 9, 24, dtype=torch.float64)
    attention = layer.self_attn
    cos, sin = (x.double() for x in rotary(states, torch.arange(9)[None]))
    normed = layer.input_layernorm(states)
    key = attention.k_norm(attention.k_proj(normed).unflatten(-1, (2, 10))).transpose(1, 2)
    want_value = attention.v_proj(normed).unflatten(-1, (2, 10)).transpose(1, 2)
    want_key = qwen.apply_rotary_pos_emb(key, key, cos, sin)[1]
    key, value = reference.audio_kv(
        states, layer.input_layernorm.weight, attention.k_proj.weight, attention.v_proj.weight, num_kv_heads=2,
        eps=config.rms_norm_eps, k_norm_weight=attention.k_norm.weight, cos=cos, sin=sin,
    )  # fmt: skip
    assert max_error(key, want_key) <= 1e-6  # Qwen's norms compute in float32
    assert max_error(value, want_value) <= 1e-5


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_small_states_feel_eps(impl):
    """Both norms divide by a root in which eps outweighs the mean square, and its gradient vanishes nowhere."""
    tensors, numbers = arguments(*EVERYTHING)
    with torch.no_grad():
        for name in ("states", "k_weight", "k_bias"):
            tensors[name].mul_(1e-3)
    got, want = results(tensors, numbers, impl), results(in_float64(tensors), numbers, "reference")
    for x, y in zip(got, want, strict=True):
        assert max_error(x, y) <= 1e-5 * y.abs().max().item()
