"""Packed rows: texts one after another in one row, as padding-free collators make them, each with its audio."""

import pytest
import torch
from support.attached import KINDS, LENGTHS, audio_state, batch, texts
from support.oracles import build
from transformers import DataCollatorWithFlattening, DynamicCache, masking_utils

from palkernels.model import AudioState, LalConfig, attach, attach_flamingo
from palkernels.model.causal_lm import attention

POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
LAYERS = {"qwen2": (1, 2), "qwen2-window": (0,), "gemma3": (1,)}  # the others: all
CASES = [
    *(("llama", rope, kind, "sdpa") for rope in ("sequence", "none") for kind in KINDS),
    ("llama", "sequence", "shared, inserted", "triton"),
    ("llama", "none", "lengths", "triton"),
    ("mistral-window", "sequence", "two clips", "sdpa"),
    ("gemma2", "sequence", "inserted", "sdpa"),
    ("gemma3", "none", "shared, inserted", "sdpa"),
    ("qwen2", "sequence", "per layer", "sdpa"),
    ("qwen2-window", "sequence", "inserted", "sdpa"),
    ("phi3", "sequence", "lengths", "sdpa"),
]


def packed():
    return {"input_ids": torch.cat(texts()).unsqueeze(0), "position_ids": POSITIONS}


def run(family, rope, impl, kind, arguments, mask=None):
    """Logits of all tokens, and gradients of states and weights, in float64."""
    model = build(family, torch.float64).train()
    layers = LAYERS.get(family, "all")
    attach(model, LalConfig(layers, rope, impl))
    state = audio_state(kind, torch.float64, layers)
    leaves = [state.states] if isinstance(state.states, torch.Tensor) else [x for x in state.states if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    logits = model(**arguments, audio=state).logits
    logits = logits[0] if mask is None else logits[mask.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits, gradients | {f"states {i}": leaf.grad for i, leaf in enumerate(leaves)}


@pytest.mark.parametrize(("family", "rope", "kind", "impl"), CASES)
def test_logits_and_gradients_are_the_padded_batchs(family, rope, kind, impl):
    _, padded, mask = batch(texts(), "right")
    got, gradients = run(family, rope, impl, kind, packed())
    want, expected = run(family, rope, "sdpa", kind, {"input_ids": padded, "attention_mask": mask}, mask)
    assert float((got - want).detach().abs().max()) <= 1e-10
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert float((gradients[name] - gradient).abs().max()) <= 1e-5, name  # norms compute in float32


def test_no_mask_is_made(monkeypatch):
    """Neither by transformers nor here; varlen's kernel runs in every layer."""
    model, calls = build("llama"), []
    attach(model)
    arguments = packed() | {"audio": audio_state("inserted", torch.float32)}
    want = model(**arguments).logits
    monkeypatch.setattr(attention, "lal_attention", None)
    varlen = attention.lal_attention_varlen
    monkeypatch.setattr(attention, "lal_attention_varlen", lambda *a, **k: calls.append(1) or varlen(*a, **k))
    monkeypatch.setattr(masking_utils, "sdpa_mask", None)
    outputs = model(**arguments)
    assert torch.equal(outputs.logits, want)
    assert outputs.past_key_values is None
    assert len(calls) == 3


def test_a_collator_of_transformers():
    """The loss is the mean over all tokens of what each text gives alone."""
    model = build("llama").train()
    attach(model)
    state = audio_state("lengths", torch.float32)
    collated = DataCollatorWithFlattening()([{"input_ids": ids.tolist()} for ids in texts()])
    loss = model(**collated, audio=state).loss
    total = 0
    for i, ids in enumerate(texts()):
        own = AudioState(state.states[i : i + 1], state.lengths[i : i + 1])
        total = total + (len(ids) - 1) * model(ids[None], labels=ids[None], audio=own).loss
    torch.testing.assert_close(loss, total / (sum(LENGTHS) - 3))


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build("llama", torch.float64).train()
        attach(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        state = audio_state("inserted", torch.float64)
        state.states.requires_grad_()
        model(**packed(), audio=state).logits.square().sum().backward()
        gradients.append([state.states.grad, *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def refused(message, model, **changes):
    with pytest.raises(ValueError, match=message):
        model(**packed() | {"audio": audio_state("prefix", torch.float32)} | changes)


def test_what_packed_texts_cannot_have():
    model = build("llama")
    attach(model)
    rows = "audio must describe the batch's 1 text rows, got 3"
    refused(f"{rows}$", model, position_ids=None)
    refused(f"{rows}; for packed sequences attention_mask must be None", model, attention_mask=POSITIONS * 0 + 1)
    refused(f"{rows}; for packed sequences use_cache must not be True", model, use_cache=True)
    cache = DynamicCache(config=model.config)
    model(POSITIONS[:, :3] + 1, past_key_values=cache)
    refused(f"{rows}; for packed sequences past_key_values must be None or empty", model, past_key_values=cache)
    positions = "position_ids must count each of 3 packed sequences, which audio describes, from 0, got"
    refused(positions, model, position_ids=POSITIONS + 1)
    refused(positions, model, position_ids=torch.arange(POSITIONS.shape[1])[None])
    skipping = POSITIONS.clone()
    skipping[0, 5] = 9
    refused(positions, model, position_ids=skipping)
    fewer = AudioState(torch.zeros(2, 4, 64))
    refused("each of 2 packed sequences, which audio describes, from 0, got 3", model, audio=fewer)
    one = AudioState(torch.zeros(1, 4, 64))
    refused("or each packed sequence of a single row, for each of which audio must describe", model, audio=one)
    many = AudioState(torch.zeros(99, 4, 64))
    refused("for packed sequences no text may be empty", model, audio=many)
    refused("packed ones are told by position_ids", model, cu_seq_lens_q=torch.tensor([0, 7, 11, 20]))
    with pytest.raises(ValueError, match="insert_at must be at most each text's length"):
        model(**packed(), audio=AudioState(torch.zeros(3, 4, 64), insert_at=torch.tensor([7, 5, 0])))
    with pytest.raises(ValueError, match="audio must describe the prompt's 1 rows, got 3"):
        model.generate(**packed(), audio=audio_state("prefix", torch.float32), max_new_tokens=1)


@torch.no_grad()
def test_layers_without_audio_stay_stock():
    """A packed forward lends them our attention; other forwards, and detach, are as before."""
    model = build("llama")
    _, padded, mask = batch(texts(), "left")
    stock = model(padded, attention_mask=mask).logits
    handle = attach(model, LalConfig(layers=(1,)))
    with_audio = model(padded, attention_mask=mask, audio=audio_state("inserted", torch.float32)).logits
    model(**packed(), audio=audio_state("prefix", torch.float32))
    assert torch.equal(model(padded, attention_mask=mask).logits, stock)
    again = model(padded, attention_mask=mask, audio=audio_state("inserted", torch.float32)).logits
    assert torch.equal(again, with_audio)
    configs = [layer.self_attn.config for layer in model.model.layers]
    handle.detach()
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert all(config is not model.config for config in configs)


def test_what_cannot_be_packed():
    model = build("llama")
    attach(model, LalConfig(recompute_audio_kv=True))
    refused("recompute_audio_kv must be False with packed sequences", model)
    model = build("llama")
    attach_flamingo(model, 1)
    refused("for packed sequences audio must enter by LAL", model)
    model = build("llama")
    attach(model, LalConfig(layers=(1,)))
    model.model.layers[2].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    refused("packed sequences must be given to layers that are all like Llama's: .* 0 times", model)
