"""Every implementation against the definition: random and ragged shapes, NaN around and within the inputs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.kernel_runs import attention
from support.thorough import cases as number_of

from palkernels import lal_attention
from palkernels.kernels import tiles
from palkernels.testing import FEATURES, fill_unreachable, lal_case, max_error

SMALL_TILE = tiles.Tile(block_m=16, block_n=16, num_warps=4, num_stages=1)


@st.composite
def cases(draw, dtype):
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    queries = draw(st.sampled_from([1, 2, 5, 17, 40]))
    features = draw(st.sets(st.sampled_from(FEATURES)))
    return lal_case(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4])),
        kv_heads=kv_heads,
        queries=queries,
        keys=queries + draw(st.sampled_from([0, 1, 16, 33])),
        audio=draw(st.sampled_from([0, 1, 15, 16, 17, 50])),
        dim=draw(st.sampled_from([8, 16, 24, 64])),
        features=sorted(features),
        audio_rows=draw(st.integers(1, 4)),
        dtype=dtype,
        seed=draw(st.integers(0, 2**20)),
        poison=draw(st.booleans()),
    )


def random_cases(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def run(case, impl):
    with tiles.use(SMALL_TILE):
        return lal_attention(*case.tensors, **case.options, return_lse=True, impl=impl)


def check_against_reference(case, impl, tolerance):
    out, lse = run(case, impl)
    want_out, want_lse = run(case.to(torch.float64), "reference")
    assert out.dtype == case.tensors[0].dtype
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    assert max_error(out, want_out) <= tolerance, case.name
    assert max_error(lse, want_lse) <= tolerance, case.name
    assert out.transpose(1, 2).is_contiguous()


@given(case=cases(torch.float64))
@random_cases(60)
def test_sdpa_float64(case):
    check_against_reference(case, "sdpa", 1e-12)


@given(case=cases(torch.float32))
@random_cases(60)
def test_sdpa_float32(case):
    check_against_reference(case, "sdpa", 1e-5)


@given(case=cases(torch.float64))
@random_cases(number_of(40))
def test_triton_float64(case):
    check_against_reference(case, "triton", 1e-12)


@given(case=cases(torch.float32))
@random_cases(number_of(25))
def test_triton_float32(case):
    check_against_reference(case, "triton", 1e-5)


@pytest.mark.parametrize(("impl", "dtype"), [("sdpa", torch.float16), ("sdpa", torch.bfloat16)], ids=str)
def test_error_against_eager(impl, dtype):
    """Over many cases the largest error is at most 1.5 times that of eager PyTorch in the same dtype.

    For the Triton kernels see test_random_cases.py.
    """
    errors = {impl: 0.0, "eager": 0.0}
    for seed in range(40):
        features = [name for bit, name in enumerate(FEATURES) if (seed * 7 + 3) >> bit & 1]
        case = lal_case(
            batch=2, heads=4, kv_heads=2, queries=1 + seed % 21, keys=21 + seed % 13, audio=seed * 5 % 67,
            dim=(16, 64, 40, 128)[seed % 4], features=features, audio_rows=3, dtype=dtype, seed=seed,
        )  # fmt: skip
        exact, _ = run(case.to(torch.float64), "reference")
        for each, got in ((impl, run(case, impl)[0]), ("eager", attention(case, "eager")[0])):
            errors[each] = max(errors[each], max_error(got, exact))
    assert 0 < errors[impl] <= 1.5 * errors["eager"]


def check_gradients(case, impl, with_lse, tolerance):
    """All five gradients, with and without the LSE's own gradient, against the reference in float64."""
    grads = []
    for each, inputs in (("reference", case.to(torch.float64)), (impl, case)):
        leaves = inputs.requires_grad()
        out, lse = run(leaves, each)
        generator = torch.Generator().manual_seed(1)
        # Drawn in float64, so that both have the same numbers.
        loss = (out.double() * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum()
        if with_lse:
            finite = lse.masked_fill(lse == -math.inf, 0)
            loss = loss + (finite.double() * torch.randn(lse.shape, dtype=torch.float64, generator=generator)).sum()
        grads.append(torch.autograd.grad(loss, leaves.tensors))
    for want, got in zip(*grads, strict=True):
        assert max_error(got, want) <= tolerance, case.name


@pytest.mark.parametrize("with_lse", [False, True])
@given(case=cases(torch.float64))
@random_cases(40)
def test_sdpa_gradients_float64(case, with_lse):
    check_gradients(case, "sdpa", with_lse, 1e-10)


@given(case=cases(torch.float32))
@random_cases(40)
def test_sdpa_gradients_float32(case):
    check_gradients(case, "sdpa", False, 2e-4)


@given(case=cases(torch.float64), with_lse=st.booleans())
@random_cases(number_of(30))
def test_triton_gradients_float64(case, with_lse):
    check_gradients(case, "triton", with_lse, 1e-10)


@pytest.mark.parametrize("impl", ["sdpa", "triton"])
@given(case=cases(torch.float32))
@random_cases(number_of(25))
def test_unreachable_values_do_not_matter(impl, case):
    """NaN and Inf in padding, beyond lengths and ends: bitwise the results of zeros there."""
    out, lse = run(fill_unreachable(case, 0.0), impl)
    for value in (float("nan"), float("inf")):
        other_out, other_lse = run(fill_unreachable(case, value), impl)
        assert torch.equal(out, other_out), case.name
        assert torch.equal(lse, other_lse), case.name


@given(case=cases(torch.float32))
@random_cases(30)
def test_unreachable_values_do_not_matter_to_sdpa_gradients(case):
    grads = []
    for value in (0.0, float("nan")):
        leaves = fill_unreachable(case, value).requires_grad()
        grads.append(torch.autograd.grad(run(leaves, "sdpa")[0].square().sum(), leaves.tensors))
    for zeros, poisoned in zip(*grads, strict=True):
        assert torch.equal(zeros, poisoned), case.name


@pytest.mark.parametrize("impl", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize(
    "empty",
    [{"batch": 0}, {"queries": 0}, {"queries": 0, "keys": 0}, {"audio": 0}],
    ids=lambda x: "-".join(x),
)
def test_empty_inputs(impl, empty):
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "queries": 3, "keys": 5, "audio": 4, "dim": 8} | empty
    case = lal_case(**shape)
    out, lse = run(case, impl)
    assert out.shape == case.tensors[0].shape
    assert lse.shape == out.shape[:3]
    assert out.isfinite().all()


@pytest.mark.parametrize("impl", ["sdpa", "triton"])
def test_text_start_beyond_text_end_sees_nothing(impl):
    case = lal_case(batch=2, heads=2, kv_heads=1, queries=3, keys=8, audio=4, dim=16)
    case.options.update(
        text_start=torch.tensor([7, 0]),
        text_end=torch.tensor([5, 5]),
        audio_lengths=torch.tensor([0, 4]),
    )
    out, lse = run(case, impl)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert lse[1].isfinite().all()


def test_autocast_casts_like_sdpa():
    case = lal_case(batch=1, heads=2, kv_heads=1, queries=3, keys=3, audio=4, dim=16)
    mixed = list(case.tensors)
    mixed[0] = mixed[0].half()
    with torch.autocast("cpu", torch.float16):
        out = lal_attention(*mixed, impl="sdpa")
    want = lal_attention(*case.to(torch.float16).tensors, impl="sdpa")
    assert out.dtype == torch.float16
    assert torch.equal(out, want)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_lse", [False, True])
def test_compiled_gradients(softcap, with_lse):
    """torch.compile sees through the portable path, in one graph, with the eager gradients."""
    case = lal_case(batch=2, heads=4, kv_heads=2, queries=5, keys=5, audio=7, dim=16, features=("lengths",))

    def loss(*tensors):
        out, lse = lal_attention(*tensors, **case.options, softcap=softcap, return_lse=True, impl="sdpa")
        return out.square().sum() + (lse.sum() if with_lse else 0)

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = case.requires_grad().tensors
        results.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().max() > 0
        assert max_error(compiled, eager) <= 1e-5


def test_one_tensor_in_several_places_compiles():
    """torch.compile's autograd.Function takes no tensor twice: keys that are values, too, broke the graph."""
    case = lal_case(batch=2, heads=4, kv_heads=2, queries=5, keys=5, audio=7, dim=16)

    def loss(query, key, audio_key):
        return lal_attention(query, key, key, audio_key, audio_key, impl="sdpa").square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        query, key, _, audio_key, _ = case.requires_grad().tensors
        results.append(torch.autograd.grad(function(query, key, audio_key), (query, key, audio_key)))
    for eager, compiled in zip(*results, strict=True):
        assert eager.abs().max() > 0
        assert max_error(compiled, eager) <= 1e-5


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-300, -3.0])
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_scales_that_are_not_positive(impl, scale):
    """Causal text and audio; PyTorch's fused kernels give NaN for such scales where they hide keys themselves."""
    case = lal_case(batch=2, heads=4, kv_heads=2, queries=5, keys=5, audio=7, dim=16, features=("lengths",))
    case.options["scale"] = scale
    exact = attention(case.to(torch.float64), "reference", with_lse=False)
    for got, want in zip(attention(case, impl, with_lse=False), exact, strict=True):
        assert max_error(got, want) <= 1e-4


def test_a_scale_may_change_between_compiled_calls():
    case = lal_case(batch=1, heads=2, kv_heads=1, queries=3, keys=3, audio=4, dim=16)

    def function(scale):
        return lal_attention(*case.tensors, scale=scale, softcap=2 * scale, impl="sdpa")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for scale in (0.3, 0.5, 0.7):  # a number that has changed becomes an input of the graph
        assert max_error(compiled(scale), function(scale)) <= 1e-6


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("name", ["audio_lengths", "audio_index", "text_end"])
def test_what_changed_before_backward_raises(impl, name):
    case = lal_case(
        batch=2, heads=2, kv_heads=1, queries=3, keys=5, audio=4, dim=8, features=("lengths", "index", "text_end")
    )  # fmt: skip
    options = {key: value.long() for key, value in case.options.items()}
    out = lal_attention(*case.requires_grad().tensors, **options, impl=impl)
    options[name].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_no_forward_mode(impl):
    case = lal_case(batch=1, heads=2, kv_heads=1, queries=3, keys=3, audio=4, dim=8)
    query, *rest = case.tensors
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode tangents|jvp"):
        torch.func.jvp(lambda x: lal_attention(x, *rest, impl=impl), (query,), (query,))


def test_auto_is_sdpa_on_a_cpu():
    case = lal_case(batch=1, heads=2, kv_heads=1, queries=3, keys=3, audio=4, dim=16)
    assert torch.equal(lal_attention(*case.tensors), lal_attention(*case.tensors, impl="sdpa"))


def test_sdpa_forms_no_mask_without_padding(monkeypatch):
    """Without padding and windows neither call gets a mask; nothing of T x (N + S) is allocated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if "scaled_dot_product" in str(func):
                assert kwargs.get("attn_mask") is None
            result = func(*args, **kwargs)
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    queries, audio = 64, 600
    case = lal_case(batch=1, heads=2, kv_heads=1, queries=queries, keys=queries, audio=audio, dim=8).requires_grad()
    with Record():
        lal_attention(*case.tensors, impl="sdpa").sum().backward()
    assert sizes
    assert max(sizes) < queries * (audio + queries)


@given(case=cases(torch.float32))
@random_cases(8)
def test_tiles_agree(case):
    """A tile is a schedule, not a result: outputs and gradients agree across block shapes."""
    assume(case.tensors[0].numel())
    results = []
    for tile in (SMALL_TILE, tiles.Tile(32, 64, 4, 1), tiles.Tile(64, 16, 4, 1)):
        with tiles.use(tile):
            results.append(attention(case, "triton"))
    assert all(max_error(x, y) <= 2e-5 for other in results[1:] for x, y in zip(other, results[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 5, 128])
@pytest.mark.parametrize(
    "features", [(), ("lengths", "text_start"), ("index", "visible_from"), FEATURES], ids=lambda x: "-".join(x)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_portable_path(device, dtype, features, queries):
    """The portable path runs on a GPU too, by other kernels of PyTorch's than on a CPU."""
    case = lal_case(
        batch=3, heads=8, kv_heads=2, queries=queries, keys=128, audio=300, dim=64, features=features, dtype=dtype,
        device=device,
    )  # fmt: skip
    got = attention(case, "sdpa", with_lse=False)
    want = attention(case.to(torch.float64), "reference", with_lse=False)
    for x, y in zip(got, want, strict=True):
        assert max_error(x, y) <= 64 * torch.finfo(dtype).eps * max(1.0, y[y.isfinite()].abs().max().item())
