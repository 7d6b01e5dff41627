"""Audio rows of very different lengths: padding passes no layer's projections, and the results are the same."""

import pytest
import torch
from support.attached import tiny

from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm import request, valid_tokens
from palkernels.model.causal_lm.valid_tokens import ValidTokens
from palkernels.testing import max_error

WIDTH, TOKENS = 64, 40
LENGTHS = (3, 40, 0, 7)


def tiny_llama(dtype=torch.float32):
    torch.manual_seed(0)
    return tiny("llama").to(dtype)


def state(case, dtype=torch.float32):
    """Four texts' audio; the states are leaves."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    options = {"lengths": torch.tensor(LENGTHS)}
    if case == "places":
        options["insert_at"] = torch.tensor([0, 2, 3, 5])
    if case == "shared, at several places":
        options |= {"index": torch.tensor([1, 1, 0, 3]), "insert_at": torch.tensor([0, 2, 2, 5])}
    return AudioState(states, **options), states


def results(case, config, dtype):
    """Logits, and the gradients of audio and of one projection."""
    model = tiny_llama(dtype).train()
    handle = attach(model, config)
    # In float64 the layers' own modules project: Llama's norm computes in float32, unlike audio_kv.
    by = "fused" if dtype == torch.float32 else "modules"
    assert {layer.audio_kv for layer in handle.report().layers} == {by}
    audio, states = state(case, dtype)
    ids = torch.randint(3, 100, (4, 6), generator=torch.Generator().manual_seed(1))
    logits = model(ids, audio=audio).logits
    weight = model.model.layers[1].self_attn.k_proj.weight
    gradients = torch.autograd.grad(logits.square().sum(), [states, weight])
    handle.detach()
    return [logits, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fused", "modules"])
@pytest.mark.parametrize(
    "config", [LalConfig(), LalConfig(rope="none"), LalConfig(recompute_audio_kv=True)], ids=["rope", "none", "again"]
)
@pytest.mark.parametrize("case", ["before the text", "places", "shared, at several places"])
def test_results_are_those_with_padding(case, config, dtype, monkeypatch):
    without = results(case, config, dtype)
    monkeypatch.setattr(ValidTokens, "of", lambda *_: None)
    largest = 2e-5 if dtype == torch.float32 else 1e-6  # the norm is float32's in both
    for got, want in zip(without, results(case, config, dtype), strict=True):
        assert max_error(got, want) <= largest * want.abs().max()
    assert without[1][0, LENGTHS[0] :].abs().max() == 0  # padding has no gradient


@pytest.mark.parametrize("grad", [False, True])
def test_padding_passes_no_projection(grad, monkeypatch):
    """50 of 160 states are valid. Where most are, nothing is copied."""
    seen = []
    project = request.project_fused

    def recorded(layers, states, *rest):
        seen.append(tuple(states.shape))
        return project(layers, states, *rest)

    monkeypatch.setattr(request, "project_fused", recorded)
    model = tiny_llama().train(grad)
    attach(model)
    ids = torch.randint(3, 100, (4, 6))
    with torch.set_grad_enabled(grad):
        model(ids, audio=state("before the text")[0])
        assert set(seen) == {(1, sum(LENGTHS), WIDTH)}
        seen.clear()
        states = torch.randn(4, TOKENS, WIDTH)
        model(ids, audio=AudioState(states, torch.tensor([40, 38, 30, 20])))
    assert set(seen) == {(4, TOKENS, WIDTH)}


def test_the_modules_see_no_padding():
    model = tiny_llama()
    attach(model)
    rows = []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].shape[:2].numel())
    )
    with torch.no_grad():
        model(torch.randint(3, 100, (4, 6)), audio=state("before the text")[0])
    assert sorted(rows) == [4 * 6, sum(LENGTHS)]


def test_no_audio_at_all():
    """Rows without a valid token: packing keeps one that is padding, which nobody sees."""
    model = tiny_llama().eval()
    attach(model)
    ids = torch.randint(3, 100, (2, 6))
    with torch.no_grad():
        audio = AudioState(torch.full((2, TOKENS, WIDTH), 1e3), torch.tensor([0, 0]))
        torch.testing.assert_close(model(ids, audio=audio).logits, model(ids).logits)


def test_packing():
    lengths = torch.tensor([2, 0, 1])
    valid = ValidTokens.of(lengths, 4, 3)
    assert valid is not None
    assert valid.place.tolist() == [0, 1, 8]
    states = torch.arange(12.0).view(3, 4, 1)
    assert valid.pack(states).flatten().tolist() == [0, 1, 8]
    shared = torch.arange(4.0).view(1, 4, 1)
    assert valid.pack_rotation((shared, shared))[0].flatten().tolist() == [0, 1, 0]
    assert valid.pack_rotation((states, states))[1].flatten().tolist() == [0, 1, 8]
    key, value = valid.unpack((torch.tensor([5.0, 6.0, 7.0]).view(1, 1, 3, 1),) * 2)
    assert key.shape == (3, 1, 4, 1)
    assert key.flatten().tolist() == [5, 6, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]
    assert value.stride() == key.stride()
    most = round((1 - valid_tokens.LEAST_SAVING) * 12)
    assert ValidTokens.of(lengths, 4, most - 1) is not None
    assert ValidTokens.of(lengths, 4, most) is None
