"""A forward with audio: the logits and gradients of stock models on the concatenated sequence."""

import pytest
import torch
from support.attached import (
    KINDS,
    LENGTHS,
    TOKENS,
    WIDTH,
    audio_state,
    batch,
    largest_difference,
    oracle_rows,
    texts,
    unpadded,
)
from support.oracles import FAMILIES, build, oracle_logits, rows_of
from support.thorough import combinations

from palkernels.model import AudioState, LalConfig, attach


@pytest.mark.parametrize(("family", "rope", "kind"), combinations(FAMILIES, ["sequence", "none"], KINDS))
def test_logits(family, rope, kind):
    """Left- and right-padded and unpadded batches, all layers and a subset: fp32 within 1e-5."""
    model = build(family)
    for side, layers in (("left", "all"), ("right", (0, 2)), ("none", (1,)), ("left", (1, 2))):
        ids, padded, mask = batch(texts(), side)
        state = audio_state(kind, torch.float32, layers)
        handle = attach(model, LalConfig(layers=layers, rope=rope))
        with torch.no_grad():
            got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
            handle.detach()
            want = oracle_rows(model, rope, ids, state, layers)
        assert largest_difference(got, want) <= 1e-5, (side, layers)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_other_implementations(impl):
    model = build("llama")
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    with torch.no_grad():
        handle = attach(model, LalConfig(impl=impl))
        got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
        handle.detach()
        assert largest_difference(got, oracle_rows(model, "sequence", ids, state, "all")) <= 1e-5


GRADIENT_KINDS = ["inserted", "shared, inserted", "per layer"]
GRADIENT_CASES = [
    *((*case, "sdpa") for case in combinations(FAMILIES, ["sequence", "none"], GRADIENT_KINDS)),
    ("llama", "sequence", "shared, inserted", "triton"),
    ("qwen2", "none", "per layer", "triton"),
]


@pytest.mark.parametrize(("family", "rope", "kind", "impl"), GRADIENT_CASES)
def test_gradients(family, rope, kind, impl):
    """Loss gradients in float64 for the audio states and every weight: within 1e-6 of the oracle's."""
    ids, padded, mask = batch(texts(), "left")
    weights = [torch.randn(len(row), 101, generator=torch.Generator().manual_seed(3)).double() for row in ids]
    results = []
    for attached in (True, False):
        model = build(family, torch.float64)
        state = audio_state(kind, torch.float64, "all")
        leaves = [state.states] if isinstance(state.states, torch.Tensor) else state.states
        for leaf in leaves:
            leaf.requires_grad_()
        if attached:
            attach(model, LalConfig(rope=rope, impl=impl))
            logits = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
        else:
            logits = [oracle_logits(model, row, range(3), rope) for row in rows_of(ids, LENGTHS, state, 3)]
        loss = sum((row * weight).sum() for row, weight in zip(logits, weights, strict=True))
        loss.backward()
        named = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({**named, **{f"states {i}": leaf.grad for i, leaf in enumerate(leaves)}})
    got, want = results
    assert got.keys() == want.keys()
    assert any(".k_proj." in name or ".qkv_proj." in name for name in got)
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        assert float((got[name] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), name


@torch.no_grad()
def test_no_layers_is_the_text_alone():
    model = build("llama")
    _, padded, _ = batch(texts(), "none")
    stock = model(padded).logits
    with pytest.warns(UserWarning, match="layers should name a layer that hears the audio, got none"):
        attach(model, LalConfig(layers=(), rope="none"))
    assert torch.equal(model(padded, audio=audio_state("prefix", torch.float32)).logits, stock)


@torch.no_grad()
def test_audio_of_length_zero_is_the_text_alone():
    model = build("llama")
    ids, padded, mask = batch(texts(), "left")
    want = [model(row[None]).logits[0] for row in ids]
    attach(model)
    state = AudioState(torch.full((3, TOKENS, WIDTH), 7.0), lengths=torch.zeros(3, dtype=torch.int32))
    got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
    assert largest_difference(got, want) <= 1e-5
    empty = AudioState(torch.zeros(3, 0, WIDTH), insert_at=torch.tensor([1, 2, 0]))
    got = unpadded(model(padded, attention_mask=mask, audio=empty).logits, mask)
    assert largest_difference(got, want) <= 1e-5


def test_without_a_mask_positions_may_jump():
    """Without a mask and cache, transformers reads a jump in positions as packed sequences and cuts the attention of
    layers without audio."""
    model = build("llama")
    _, padded, mask = batch(texts(), "none")
    state = audio_state("inserted", torch.float32)
    attach(model, LalConfig(layers=(1,)))
    with torch.no_grad():
        without = model(padded, audio=state, use_cache=False).logits
        torch.testing.assert_close(without, model(padded, attention_mask=mask, audio=state).logits)
    options = {"audio": state, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(padded, **options, use_cache=False), model.generate(padded, **options))


@torch.no_grad()
def test_position_ids_are_the_texts_own():
    model = build("llama")
    _, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    attach(model)
    want = model(padded, attention_mask=mask, audio=state).logits
    own = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model(padded, attention_mask=mask, position_ids=own, audio=state).logits, want)
    with pytest.raises(ValueError, match="position_ids must count each row's own text from 0"):
        model(padded, attention_mask=mask, position_ids=own + 1, audio=state)


def test_training_step_with_checkpointing_equals_without():
    gradients = []
    for checkpointing in ("off", "after attach", "before attach"):
        model = build("llama", torch.float64).train()
        if checkpointing == "after attach":
            attach(model)
        if checkpointing != "off":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        attach(model)
        _, padded, mask = batch(texts(), "right")
        state = audio_state("inserted", torch.float64)
        state.states.requires_grad_()
        labels = padded.masked_fill(mask == 0, -100)
        model(padded, attention_mask=mask, labels=labels, audio=state).loss.backward()
        gradients.append([state.states.grad, *(p.grad for p in model.parameters())])
    for plain, *others in zip(*gradients, strict=True):
        for checkpointed in others:
            torch.testing.assert_close(checkpointed, plain)
