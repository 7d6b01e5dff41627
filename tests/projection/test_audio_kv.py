"""audio_kv: K and V of audio states, against its definition; what it keeps for the backward pass; what it refuses."""

import gc

import pytest
import torch
from support import interpreter
from support.kernel_runs import arithmetic
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from palkernels import audio_kv, lal_attention, lal_attention_varlen, reference
from palkernels.projection import ops as projection
from palkernels.projection.call import PROJECTION, TURNS, Projection
from palkernels.testing import max_error

FEATURES = ("k_bias", "v_bias", "k_norm_weight", "rope", "partial_rope", "rope_per_row", "norm_offset")
EVERYTHING = ("k_bias", "v_bias", "k_norm_weight", "rope_per_row", "norm_offset")
OPERATORS = torch.ops.palkernels


def arguments(
    *features, rows=2, tokens=37, width=24, heads=2, dim=10, dtype=torch.float32, device="cpu", seed=0, poison=False
):
    """Tensors as leaves that need gradients, by name, cos and sin without; and the numbers."""
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape, needs=True):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        if poison:  # every other element of a larger tensor that is NaN elsewhere
            parent = torch.full([2 * size + 2 for size in shape], float("nan"), dtype=dtype, device=device)
            values = parent[tuple(slice(1, 1 + 2 * size, 2) for size in shape)].copy_(values)
        return values.requires_grad_(needs)

    tensors = {
        "states": floats(rows, tokens, width),
        "norm_weight": floats(width),
        "k_weight": floats(heads * dim, width),
        "v_weight": floats(heads * dim, width),
    }
    for name in ("k_bias", "v_bias"):
        if name in features:
            tensors[name] = floats(heads * dim)
    if "k_norm_weight" in features:
        tensors["k_norm_weight"] = floats(dim)
    turned = dim - 4 if "partial_rope" in features else dim
    for name in ("cos", "sin"):
        if "rope_per_row" in features:
            tensors[name] = floats(rows, tokens, turned, needs=False)
        elif "rope" in features or "partial_rope" in features:
            tensors[name] = floats(tokens, turned, needs=False)
    numbers = {"num_kv_heads": heads, "eps": 1e-5, "norm_offset": 1.0 if "norm_offset" in features else 0.0}
    return tensors, numbers


def leaves(tensors):
    return [x for x in tensors.values() if x.requires_grad]


def results(tensors, numbers, impl, seed=1):
    """K, V and the gradients of all leaves, for upstream gradients that do not depend on the dtype."""
    outputs = audio_kv(**tensors, **numbers, impl=impl)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves(tensors), upstream)]


def in_float64(tensors):
    return {name: x.detach().cpu().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}


def assert_close(got, want, bound):
    for place, (x, y) in enumerate(zip(got, want, strict=True)):
        assert max_error(x.cpu(), y) <= bound * max(1.0, y.abs().max().item()), place


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(), *[(x,) for x in FEATURES], EVERYTHING], ids=lambda x: "-".join(x) or "plain")
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_against_the_definition(device, impl, features):
    """In strict IEEE float32; dimensions that divide no block."""
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
    """Within a few roundings of the definition, also where states are so large that their products would overflow."""
    tensors, numbers = arguments(*EVERYTHING, width=64, dtype=dtype, device=device)
    with torch.no_grad():
        tensors["states"].mul_(1000.0)
    if dtype == torch.bfloat16 and device == "cpu" and impl == "triton":
        pytest.skip("refused by the interpreter")
    bound = 16 * torch.finfo(dtype).eps
    assert_close(results(tensors, numbers, impl)[:2], results(in_float64(tensors), numbers, "reference")[:2], bound)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("features", [(), EVERYTHING, ("partial_rope", "k_norm_weight")], ids=len)
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


# Every layer of a model at once


def layers_of(count, *features, **sizes):
    """As :func:`arguments`, with a list of ``count`` for all but the states."""
    made = [arguments(*features, **sizes, seed=seed) for seed in range(count)]
    names = [name for name in made[0][0] if name != "states"]
    return {"states": made[0][0]["states"]} | {name: [x[name] for x, _ in made] for name in names}, made[0][1]


def one_layer(tensors, layer):
    return {name: x[layer] if isinstance(x, list) else x for name, x in tensors.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(), EVERYTHING], ids=len)
@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_all_layers_at_once(device, impl, features):
    tensors, numbers = layers_of(3, *features, device=device)
    with torch.no_grad():
        keys, values = audio_kv(**tensors, **numbers, impl=impl)
    assert isinstance(keys, list)
    assert isinstance(values, list)
    for layer in range(3):
        want = audio_kv(**in_float64(one_layer(tensors, layer)), **numbers, impl="reference")
        assert_close([keys[layer], values[layer]], want, 5e-6)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_all_layers_with_gradients(impl):
    tensors, numbers = layers_of(2, *EVERYTHING)
    keys, values = audio_kv(**tensors, **numbers, impl=impl)
    total = sum(
        (key * (2 + i)).sum() + (value * (3 + i)).sum() for i, (key, value) in enumerate(zip(keys, values, strict=True))
    )
    got = torch.autograd.grad(total, [tensors["states"], *tensors["k_weight"]])
    want = torch.zeros_like(tensors["states"])
    for layer in range(2):
        key, value = audio_kv(**one_layer(tensors, layer), **numbers, impl="reference")
        alone = (key * (2 + layer)).sum() + (value * (3 + layer)).sum()
        states, weight = torch.autograd.grad(alone, [tensors["states"], tensors["k_weight"][layer]])
        assert_close([got[1 + layer]], [weight], 1e-5)
        want += states
    assert_close([got[0]], [want], 1e-5)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_layers_may_differ_and_share(impl):
    """Some with a bias, one without RoPE, and one cos for all."""
    tensors, numbers = layers_of(3, "k_bias", "rope")
    tensors["k_bias"][1] = None
    shared = tensors | {"cos": tensors["cos"][0], "sin": tensors["sin"][0]}
    tensors["cos"][2] = tensors["sin"][2] = None
    for given in (tensors, shared):
        with torch.no_grad():
            keys, values = audio_kv(**given, **numbers, impl=impl)
        for layer in range(3):
            want = audio_kv(**one_layer(given, layer), **numbers, impl="reference")
            assert_close([keys[layer], values[layer]], want, 5e-6)


@pytest.mark.gpu
def test_all_layers_take_one_normalisation_and_one_product(device, monkeypatch):
    calls = []

    def count(place, name):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: calls.append(name) or real(*args))

    count(projection._steps(fused=True), "normalise")
    count(torch, "bmm")
    count(projection, "linear")
    tensors, numbers = layers_of(4, device=device)
    with torch.no_grad():
        audio_kv(**tensors, **numbers, impl="triton")
    assert calls == ["normalise", "bmm"]


# What is kept for the backward pass


def kept_bytes(run, given):
    """Bytes of what autograd keeps of a call, beside the tensors that are given."""
    known = {x.untyped_storage().data_ptr() for x in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(kept.values()), result


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("features", [(), EVERYTHING], ids=len)
def test_kept_bytes_per_audio_token_and_layer(impl, recompute, features):
    """K and V, or nothing; the text's own tensors and the output are counted apart."""
    rows, tokens, heads, dim = 2, 64, 2, 10
    tensors, numbers = arguments(*features, rows=rows, tokens=tokens)
    query, key, value = (torch.randn(rows, x, 5, dim).requires_grad_() for x in (4, heads, heads))
    alone = torch.randn(rows, heads, tokens, dim)

    def run():
        audio = audio_kv(**tensors, **numbers, impl=impl, recompute=recompute)
        return lal_attention(query, key, value, *audio, impl=impl)

    given = [*tensors.values(), query, key, value, alone]
    total, _ = kept_bytes(run, given)
    # The output and its LSE are kept for the same attention without gradients of audio, too.
    text, _ = kept_bytes(lambda: lal_attention(query, key, value, alone, alone, impl=impl), given)
    key_and_value = 2 * rows * tokens * heads * dim * 4
    assert total - text == (0 if recompute else key_and_value)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_nothing_lives_on_with_recompute(impl):
    """Not even in the graph: the tensors are gone once the caller lets them go."""
    import weakref

    tensors, numbers = arguments(*EVERYTHING)
    query, key, value = (torch.randn(2, x, 5, 10) for x in (4, 2, 2))
    audio = audio_kv(**tensors, **numbers, impl=impl, recompute=True)
    out = lal_attention(query, key, value, *audio, impl=impl)
    storages = [weakref.ref(x.untyped_storage()) for x in audio]
    want = torch.autograd.grad(out.sum(), leaves(tensors), retain_graph=True)
    del audio
    gc.collect()
    assert all(x() is None for x in storages)
    again = torch.autograd.grad(out.sum(), leaves(tensors))
    assert all(torch.equal(x, y) for x, y in zip(want, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("around", ["nothing", "checkpoint", "hooks"])
def test_recomputed_gradients_are_the_same(device, impl, around):
    """Bit for bit; also inside of what itself changes how autograd keeps tensors."""
    tensors, numbers = arguments(*EVERYTHING, device=device)
    text = [torch.randn(2, x, 5, 10, device=device).requires_grad_() for x in (4, 2, 2)]
    seen = []

    def run(recompute, *text):
        audio = audio_kv(**tensors, **numbers, impl=impl, recompute=recompute)
        return lal_attention(*text, *audio, impl=impl)

    def gradients(recompute):
        if around == "checkpoint":
            out = checkpoint(run, recompute, *text, use_reentrant=False)
        elif around == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
                out = run(recompute, *text)
        else:
            out = run(recompute, *text)
        return torch.autograd.grad(out.square().sum(), [*leaves(tensors), *text])

    want, got = gradients(False), gradients(True)
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))
    if around == "hooks":
        audio = torch.Size([2, 2, 37, 10])
        assert seen.count(audio) == 2  # of the first run only
        assert seen.count(text[0].shape) >= 4  # query and output, of both


@pytest.mark.parametrize("frozen", [False, True])
def test_recompute_notices_a_changed_weight(frozen):
    """Where nothing of the audio needs gradients, autograd itself would not."""
    tensors, numbers = arguments()
    tensors = {name: x.detach().requires_grad_(not frozen) for name, x in tensors.items()}
    text = [torch.randn(2, x, 5, 10).requires_grad_() for x in (4, 2, 2)]
    out = lal_attention(*text, *audio_kv(**tensors, **numbers, impl="sdpa", recompute=True), impl="sdpa")
    with torch.no_grad():
        tensors["k_weight"].mul_(2)
    with pytest.raises(RuntimeError, match=r"k_weight must not change between audio_kv\(recompute=True\) and"):
        out.sum().backward()


def test_recompute_that_attention_would_not_follow_is_refused():
    """It would keep K and V without a word."""
    tensors, numbers = arguments(rows=1)
    key, value = audio_kv(**tensors, **numbers, impl="sdpa", recompute=True)
    query, text = torch.randn(1, 4, 5, 10), torch.randn(1, 2, 5, 10)
    with pytest.raises(ValueError, match=r"audio_key must be what audio_kv\(recompute=True\) returned, got a view"):
        lal_attention(query, text, text, key[:, :, :9], value[:, :, :9])
    with pytest.raises(ValueError, match=r"audio_key must be what audio_kv\(recompute=True\) returned, got a view"):
        lal_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, text, text, key, value)), cu_seqlens=torch.tensor([0, 5]),
            cu_audio=torch.tensor([0, 37]), max_seqlen=5, max_audio=37,
        )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"autocast's torch.bfloat16, got"):
        lal_attention(query, text, text, key, value)


def test_recompute_repeats_what_projected():
    """Each implementation its own: its roundings differ from another's."""
    tensors, numbers = arguments(*EVERYTHING, dtype=torch.bfloat16)
    text = [torch.randn(2, x, 5, 10, dtype=torch.bfloat16).requires_grad_() for x in (4, 2, 2)]
    gradients = []
    for recompute in (False, True):
        audio = audio_kv(**tensors, **numbers, impl="reference", recompute=recompute)
        out = lal_attention(*text, *audio, impl="sdpa")
        gradients.append(torch.autograd.grad(out.square().sum(), [*leaves(tensors), *text]))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_recompute_is_refused_under_compile():
    tensors, numbers = arguments()

    def run():
        return audio_kv(**tensors, **numbers, impl="sdpa", recompute=True)

    with pytest.raises(Exception, match="recompute must be False under"):
        torch.compile(run, fullgraph=True, backend="eager")()


# Operators


def operator_arguments(device, features=EVERYTHING, needs=True):
    tensors, numbers = arguments(*features, device=device)
    tensors = {name: x.detach().requires_grad_(needs and x.requires_grad) for name, x in tensors.items()}
    return [*(tensors.get(name) for name in (*PROJECTION, *TURNS)), *numbers.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("features", [(), EVERYTHING], ids=len)
def test_opcheck(device, fused, features):
    given = [*operator_arguments(device, features), fused]
    torch.library.opcheck(OPERATORS.audio_kv_forward.default, given)
    plain = [*operator_arguments(device, features, needs=False), fused]
    key, value = OPERATORS.audio_kv_forward(*plain)
    needed = [x is not None for x in plain[: len(PROJECTION)]]
    upstream = [torch.randn_like(key), torch.randn_like(value)]
    torch.library.opcheck(OPERATORS.audio_kv_backward.default, (*upstream, needed, *plain))
    layers = [[x, x] if i else x for i, x in enumerate(plain[:9])] + plain[9:-1]
    torch.library.opcheck(OPERATORS.audio_kv_layers.default, layers)


@pytest.mark.parametrize("fused", [False, True])
def test_fakes_have_the_real_strides(fused):
    plain = [*operator_arguments("cpu", needs=False), fused]
    upstream = [torch.randn(2, 2, 37, 10)] * 2
    layers = [[x, x] if i else x for i, x in enumerate(plain[:9])] + plain[9:-1]
    for operator, given in (
        (OPERATORS.audio_kv_forward, plain),
        (OPERATORS.audio_kv_backward, [*upstream, [True] * 7, *plain]),
        (OPERATORS.audio_kv_layers, layers),
    ):
        real = operator(*given)
        with FakeTensorMode() as mode:
            fake = operator(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, given))
        real, fake = ([x] if isinstance(x, torch.Tensor) else x for x in (real, fake))
        for got, want in zip(fake, real, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_compiles_to_one_graph(impl):
    tensors, numbers = arguments(*EVERYTHING)

    def run(states):
        key, value = audio_kv(**(tensors | {"states": states}), **numbers, impl=impl)
        return (key * value).sum()

    want = torch.autograd.grad(run(tensors["states"]), leaves(tensors))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(tensors["states"]), leaves(tensors))
    assert_close(got, want, 1e-6)


def count_flops(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_flops(impl):
    """Two products forward; backward one for each weight, two for the states, and the keys' again for their norm."""
    tensors, numbers = arguments(*EVERYTHING)
    one = 2 * (2 * 37) * 24 * 20  # 2 rows of 37 tokens, width 24, 2 heads of 10
    forward, outputs = count_flops(lambda: audio_kv(**tensors, **numbers, impl=impl))
    assert forward == 2 * one
    total = sum(x.sum() for x in outputs)
    assert count_flops(lambda: torch.autograd.grad(total, leaves(tensors), retain_graph=True))[0] == 5 * one
    assert count_flops(lambda: torch.autograd.grad(outputs[1].sum(), tensors["v_weight"]))[0] <= 2 * one
    lists, numbers = layers_of(3)
    with torch.no_grad():
        assert count_flops(lambda: audio_kv(**lists, **numbers, impl=impl))[0] == 6 * one


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


# What is refused


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
