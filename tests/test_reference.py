"""The definition itself, against a statement of it in loops."""

import math

import pytest
import torch

from palkernels import reference
from palkernels.testing import FEATURES, fill_unreachable, lal_case


def by_loops(case):
    """The definition, one query and one key at a time, in Python floats."""
    query, key, value, audio_key, audio_value = case.tensors
    o = case.options
    batch, heads, queries, dim = query.shape
    group = heads // key.shape[1]
    scale = o.get("scale", dim**-0.5)
    out, lse = torch.zeros_like(query), torch.full((batch, heads, queries), -math.inf, dtype=query.dtype)

    def number(name, row, default):
        return int(o[name][row]) if name in o else default

    for b in range(batch):
        row = number("audio_index", b, b)
        for h in range(heads):
            for t in range(queries):
                p = number("text_end", b, key.shape[2]) - queries + t
                seen = []
                for j in range(number("audio_lengths", row, audio_key.shape[2])):
                    if "audio_visible_from" not in o or int(o["audio_visible_from"][b, j]) <= p:
                        seen.append((audio_key[row, h // group, j], audio_value[row, h // group, j]))
                for s in range(key.shape[2]):
                    if number("text_start", b, 0) <= s <= p and s > p - o.get("window", key.shape[2] + p + 1):
                        seen.append((key[b, h // group, s], value[b, h // group, s]))
                scores = [float(query[b, h, t] @ k) * scale for k, _ in seen]
                if "softcap" in o:
                    scores = [o["softcap"] * math.tanh(score / o["softcap"]) for score in scores]
                if seen:
                    total = sum(math.exp(score) for score in scores)
                    lse[b, h, t] = math.log(total)
                    out[b, h, t] = sum(math.exp(s) / total * v for s, (_, v) in zip(scores, seen, strict=True))
    return out, lse


@pytest.mark.parametrize("feature", [(), *((name,) for name in FEATURES), FEATURES])
def test_matches_loops(feature):
    case = lal_case(
        batch=2, heads=4, kv_heads=2, queries=3, keys=5, audio=4, dim=3,
        features=feature, audio_rows=3, dtype=torch.float64, seed=len(feature),
    )  # fmt: skip
    out, lse = reference.lal_attention(*case.tensors, **case.options, return_lse=True)
    want_out, want_lse = by_loops(case)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def test_mask_picture():
    """The picture in the docstring."""
    mask = reference.lal_mask(
        1, 4, 4, 3, audio_lengths=torch.tensor([2]), audio_visible_from=torch.full((1, 3), 2),
        text_start=torch.tensor([1]),
    )  # fmt: skip
    rows = ["000 0000", "000 0100", "110 0110", "110 0111"]
    assert mask[0].int().tolist() == [[int(x) for x in row.replace(" ", "")] for row in rows]


def test_blind_query_gives_zero_and_finite_gradients():
    case = lal_case(batch=1, heads=2, kv_heads=1, queries=3, keys=3, audio=2, dim=4, dtype=torch.float64)
    tensors = [tensor.requires_grad_() for tensor in case.tensors]
    options = {"text_start": torch.tensor([2]), "audio_lengths": torch.tensor([0]), "softcap": 5.0}
    out, lse = reference.lal_attention(*tensors, **options, return_lse=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -math.inf).all()
    assert lse[:, :, 2].isfinite().all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 2].sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, :2] == 0).all()
    assert (grads[3] == 0).all()


def test_unreachable_values_do_not_matter():
    case = lal_case(
        batch=2, heads=2, kv_heads=1, queries=3, keys=6, audio=5, dim=4,
        features=("lengths", "visible_from", "text_start", "text_end", "softcap"), dtype=torch.float64, seed=3,
    )  # fmt: skip
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        filled = fill_unreachable(case, fill).requires_grad()
        out, lse = reference.lal_attention(*filled.tensors, **case.options, return_lse=True)
        grads = torch.autograd.grad(out.square().sum(), filled.tensors)
        results.append((out, lse, *grads))
    assert any((tensor != tensor).any() for tensor in fill_unreachable(case, float("nan")).tensors)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", [(), FEATURES], ids=["plain", "all"])
def test_16_bits_are_rounded_once(dtype, feature):
    """Outputs and gradients are those of float64 rounded to the dtype, but for float32's own errors."""
    case = lal_case(
        batch=2, heads=4, kv_heads=2, queries=9, keys=30, audio=40, dim=64,
        features=feature, audio_rows=3, dtype=dtype, seed=1,
    )  # fmt: skip
    results = []
    for inputs in (case, case.to(torch.float64)):
        inputs = inputs.requires_grad()
        out, lse = reference.lal_attention(*inputs.tensors, **inputs.options, return_lse=True)
        generator = torch.Generator().manual_seed(2)
        dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).to(out)
        results.append([out, *torch.autograd.grad(out, inputs.tensors, dout), lse])
    assert [x.dtype for x in results[0]] == [*[dtype] * 6, torch.float32]
    rounding = torch.finfo(dtype).eps / 2  # of the nearest number, relative to it
    for got, want in zip(results[0][:-1], results[1][:-1], strict=True):
        assert ((got.double() - want).abs() <= rounding * want.abs() * 1.001 + 1e-5).all()
    torch.testing.assert_close(results[0][-1].double(), results[1][-1], rtol=1e-6, atol=1e-5)


def test_gradients_are_the_derivatives():
    case = lal_case(
        batch=2, heads=2, kv_heads=1, queries=2, keys=4, audio=3, dim=3,
        features=("lengths", "index", "text_start", "window", "softcap"), audio_rows=2, dtype=torch.float64,
    ).requires_grad()  # fmt: skip
    assert torch.autograd.gradcheck(
        lambda *tensors: reference.lal_attention(*tensors, **case.options), case.tensors, fast_mode=True
    )
