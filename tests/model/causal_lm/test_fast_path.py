"""Which layers audio_kv projects, and that it makes what their modules make."""

import pytest
import torch
from support.attached import (
    TOKENS,
    WIDTH,
    audio_state,
    batch,
    largest_difference,
    oracle_rows,
    texts,
    tiny,
    unpadded,
)
from support.oracles import FAMILIES, build, oracle_logits, rows_of

from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm import fast_path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["sequence", "none"])
@torch.no_grad()
def test_fused_projection_is_used_and_right(family, rope, monkeypatch):
    """K and V come from audio_kv, without gradients all layers at once where they share states, and equal the
    modules'."""
    model = build(family)
    handle = attach(model, LalConfig(rope=rope))
    assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}
    calls = []
    audio_kv = fast_path.audio_kv
    monkeypatch.setattr(
        fast_path, "audio_kv", lambda *a, **k: calls.append((len(a[0]), len(a[1]))) or audio_kv(*a, **k)
    )
    _, padded, mask = batch(texts(), "left")
    for kind in ("prefix", "shared, inserted", "per layer"):
        options = {"attention_mask": mask, "audio": audio_state(kind, torch.float32)}
        calls.clear()
        results = [model(padded, **options).logits]
        model.generate(padded, **options, max_new_tokens=3, num_beams=2, do_sample=False)
        rows = {"prefix": 3, "shared, inserted": 2, "per layer": 1}[kind]  # the last have padding, and are packed
        assert calls == ([(rows, 1)] * 6 if kind == "per layer" else [(rows, 3)] * 2)  # beams add no rows
        calls.clear()
        with torch.enable_grad():
            results.append(model(padded, **options).logits.detach())
        assert calls == [(rows, 1)] * 3
        hook = model.model.layers[1].input_layernorm.register_forward_hook(lambda *args: None)
        slow = model(padded, **options).logits
        assert calls == [(rows, 1)] * 3
        hook.remove()
        for fast in results:
            assert largest_difference(unpadded(fast, mask), unpadded(slow, mask)) <= 1e-5


@torch.no_grad()
def test_what_is_not_plain_goes_through_modules():
    model = build("llama")
    attention = [layer.self_attn for layer in model.model.layers]
    handle = attach(model)

    class Halved(type(model.model.layers[0].input_layernorm)):
        def forward(self, x):
            return super().forward(x) / 2

    def halve():
        new, old = Halved(WIDTH), model.model.layers[1].input_layernorm
        new.load_state_dict(old.state_dict())
        model.model.layers[1].input_layernorm = new
        return old

    for change, undo, reason in (
        (
            lambda: torch.nn.modules.module.register_module_forward_hook(lambda *args: None),
            lambda made: made.remove(),
            "all modules have hooks",
        ),
        (
            halve,
            lambda made: setattr(model.model.layers[1], "input_layernorm", made),
            "its norms are others than at attach",
        ),
        (lambda: attention[1].k_proj.register_forward_hook(print), lambda made: made.remove(), "k_proj has hooks"),
        (
            lambda: setattr(attention[2], "v_proj", torch.nn.Sequential(attention[2].v_proj)),
            lambda made: setattr(attention[2], "v_proj", attention[2].v_proj[0]),
            "v_proj is a Sequential, not a plain Linear",
        ),
        (
            lambda: setattr(attention[0].k_proj, "forward", attention[0].k_proj.forward),
            lambda made: delattr(attention[0].k_proj, "forward"),
            "k_proj has a forward of its own",
        ),
    ):
        made = change()
        report = handle.report()
        assert {layer.audio_kv for layer in report.layers} == {"modules"}
        assert reason in str(report)
        undo(made)
        assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
@torch.no_grad()
def test_a_bias_that_comes_after_attach(name):
    model = build("llama")
    handle = attach(model)
    for layer in model.model.layers:
        getattr(layer.self_attn, name).bias = torch.nn.Parameter(torch.randn(32))
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}
    got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
    handle.detach()
    assert largest_difference(got, oracle_rows(model, "sequence", ids, state, "all")) <= 1e-5


@pytest.mark.parametrize("model_type", ["olmo", "nanochat"])
@torch.no_grad()
def test_norms_without_weights(model_type):
    """Accepted, through the modules."""
    model = tiny(model_type).eval()
    handle = attach(model)
    assert {layer.audio_kv for layer in handle.report().layers} == {"modules"}
    ids, state = texts()[0], AudioState(torch.randn(1, TOKENS, WIDTH))
    got = model(ids[None], audio=state).logits[0]
    handle.detach()
    row = rows_of([ids], (7,), state, 3)[0]
    assert float((got - oracle_logits(model, row, range(3), "sequence")).abs().max()) <= 1e-5


@torch.no_grad()
def test_small_weights_in_bfloat16_have_their_own_norm_offset():
    """Gemma multiplies by 1 + weight, which small keys must show, too."""
    model = tiny("gemma", initializer_range=0.002, head_dim=16).bfloat16().eval()
    handle = attach(model)
    assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}
    state = AudioState(torch.randn(1, TOKENS, WIDTH).bfloat16())
    for name in ("k_proj", "v_proj"):
        for layer in model.model.layers:
            getattr(layer.self_attn, name).weight.mul_(100.0)
    fast = model(torch.tensor([[1, 2, 3]]), audio=state).logits
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *args: None)
    slow = model(torch.tensor([[1, 2, 3]]), audio=state).logits
    assert float((fast - slow).abs().max()) <= 0.02 * float(slow.abs().max())


@torch.no_grad()
def test_hooked_modules_are_honoured():
    """Projections are called as modules, so a hook or an adapter on them also acts on the audio."""
    model = build("llama")
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: out * 0.5)
    handle = attach(model)
    got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
    handle.detach()
    assert largest_difference(got, oracle_rows(model, "sequence", ids, state, "all")) <= 1e-5
