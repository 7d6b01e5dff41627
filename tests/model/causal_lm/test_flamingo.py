"""Flamingo's gated layers: the stock model while gates are 0, and a layer written by hand where they are not."""

import pytest
import torch
from support.attached import TOKENS, WIDTH, texts
from support.flamingo import KINDS, attached, audio, batch, by_hand, open_gates, positions, rows_of
from support.oracles import build
from transformers import DynamicCache, StaticCache

from palkernels.model import AudioState
from palkernels.model.causal_lm.flamingo import attach_flamingo

FAMILIES = ("llama", "qwen3", "gemma3", "phi3-window")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_against_a_layer_written_by_hand(kind):
    """Left- and right-padded: float64 within 1e-9 of one unpadded row at a time."""
    model, handle = attached("llama", every=2)
    stock = build("llama", torch.float64)
    want = [
        by_hand(stock, handle.layers, ids, *of_row) for ids, of_row in zip(texts(), rows_of(audio(kind)), strict=True)
    ]
    for side in ("left", "right"):
        ids, mask = batch(side)
        logits = model(ids, attention_mask=mask, position_ids=positions(mask), audio=audio(kind)).logits
        for got, keep, wanted in zip(logits, mask.bool(), want, strict=True):
            torch.testing.assert_close(got[keep], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_and_setting(family):
    """Other models' layers, other heads than the model's, a layer before each: as by hand."""
    model, handle = attached(family, every=1, heads=3, head_dim=8, ffn_multiplier=2)
    stock = build(family, torch.float64)
    assert [tuple(x.q_proj.weight.shape) for x in handle.layers.values()] == [(24, WIDTH)] * 3
    assert handle.layers["0"].up_proj.weight.shape == (2 * WIDTH, WIDTH)
    ids, state = texts()[0][None], AudioState(torch.randn(1, TOKENS, WIDTH).double(), insert_at=torch.tensor([2]))
    want = by_hand(stock, handle.layers, ids[0], state.states[0], torch.full((TOKENS,), 2))
    torch.testing.assert_close(model(ids, audio=state).logits[0], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_closed_gates_are_the_stock_model(family):
    """As attached, to the bit: forward with and without a mask, and greedy generation."""
    stock, model = build(family), build(family)
    handle = attach_flamingo(model, 1)
    ids, mask = batch("left")
    state = audio("inserted", torch.float32)
    assert torch.equal(model(ids, audio=state).logits, stock(ids).logits)
    assert torch.equal(model(ids, attention_mask=mask, audio=state).logits, stock(ids, attention_mask=mask).logits)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, audio=state, **settings), stock.generate(ids, **settings))
    open_gates(handle)
    assert not torch.equal(model(ids, attention_mask=mask, audio=state).logits, stock(ids, attention_mask=mask).logits)
    assert torch.equal(model(ids).logits, stock(ids).logits)  # no audio, no new layers


@torch.no_grad()
def test_what_sees_no_audio_is_the_stock_models():
    """Text before the audio and rows without any, whatever the gates; there may be no audio at all."""
    model, _ = attached()
    ids, mask = batch("left")
    want = build("llama", torch.float64)(ids, attention_mask=mask).logits
    got = model(ids, attention_mask=mask, audio=audio("inserted")).logits
    torch.testing.assert_close(got[0, 2:5], want[0, 2:5])  # three tokens before the clip
    torch.testing.assert_close(got[1, 5:], want[1, 5:])  # the clip stands behind the prompt
    assert (got[0, 5:] - want[0, 5:]).abs().amax(dim=-1).min() > 1e-3
    for state in (audio("none"), AudioState(torch.zeros(3, 0, WIDTH).double())):
        torch.testing.assert_close(model(ids, attention_mask=mask, audio=state).logits[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation(kind):
    """Cached steps give the tokens of forwards over the whole text; each layer projects the audio once a call."""
    model, handle = attached(every=1)
    ids, mask = batch("left")
    calls = []
    handle.layers["0"].k_proj.register_forward_hook(lambda *_: calls.append(1))
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    results = model.generate(ids, audio=audio(kind), **settings)
    assert len(calls) == 1
    assert torch.equal(model.generate(ids, audio=audio(kind), use_cache=False, **settings), results)
    for _ in range(5):
        step = model(ids, attention_mask=mask, audio=audio(kind)).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids, mask = torch.cat([ids, step], dim=1), torch.cat([mask, torch.ones_like(step)], dim=1)
    assert torch.equal(results, ids)


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text():
    """A forward that continues a cache sees the audio from where it stands; so does one with a static cache."""
    model, _ = attached(every=1)
    ids, mask = batch("left")
    state, places = audio("two clips"), positions(mask)
    want = model(ids, attention_mask=mask, position_ids=places, audio=state).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        for first, last in ((0, 6), (6, 7), (7, 9)):
            step = model(
                ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=places[:, first:last],
                past_key_values=cache,
                audio=state,
            )
            valid = mask[:, first:last].bool()
            torch.testing.assert_close(step.logits[valid], want[:, first:last][valid])


@torch.no_grad()
def test_beams_share_the_audio():
    """Each beam of a row reads that row's audio: the same sequences as one row at a time."""
    model, _ = attached()
    ids, mask = batch("left")
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    results = model.generate(ids, attention_mask=mask, audio=audio("lengths"), **settings)
    for row, (states, _) in enumerate(rows_of(audio("lengths"))):
        alone = model.generate(texts()[row][None], audio=AudioState(states[None]), **settings)
        assert torch.equal(alone[0, -4:], results[row, -4:])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(checkpointed):
    """They reach gates, projections, norms, the audio and the model; checkpointing changes none of them."""
    results = []
    for on in (False, checkpointed):
        model, handle = attached(every=1)
        model.train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        state = audio("inserted")
        state.states.requires_grad_()
        ids, mask = batch("left")
        kept = []
        handle.layers["1"].up_proj.register_forward_hook(lambda *_, kept=kept: kept.append(1))
        model(ids, attention_mask=mask, labels=ids, audio=state).loss.backward()
        assert len(kept) == 1 + on  # its activations are made again where they are not kept
        parameters = {**dict(handle.layers.named_parameters()), **dict(model.named_parameters())}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
        assert (state.states.grad[0, :4].abs().sum(dim=-1) > 0).all()
        assert (state.states.grad[0, 4:] == 0).all()
        results.append({name: p.grad for name, p in parameters.items()} | {"states": state.states.grad})
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["prefix", "two clips", "shared"])
def test_triton_kernels(kind):
    """Logits and gradients by the kernels are those of the portable path."""
    results = []
    for impl in ("sdpa", "triton"):
        model, handle = attached(every=2, dtype=torch.float32, impl=impl)
        state = audio(kind, torch.float32)
        state.states.requires_grad_()
        ids, mask = batch("left")
        out = model(ids, attention_mask=mask, labels=ids, audio=state)
        out.loss.backward()
        grads = {name: p.grad for name, p in handle.layers.named_parameters()} | {"states": state.states.grad}
        results.append(grads | {"logits": out.logits})
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_states_per_layer():
    """One entry per model layer, a tensor where a new layer stands."""
    model, _ = attached(every=2)
    ids, mask = batch("left")
    one = audio("prefix").states
    want = model(ids, attention_mask=mask, audio=AudioState(one)).logits
    assert torch.equal(model(ids, attention_mask=mask, audio=AudioState([None, one, None])).logits, want)
    with pytest.raises(ValueError, match=r"a tensor exactly at layers \[1\], got 3 entries with tensors at \[0, 1\]"):
        model(ids, attention_mask=mask, audio=AudioState([one, one, None]))
