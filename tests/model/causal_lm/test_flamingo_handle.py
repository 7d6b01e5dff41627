"""The life of a model that Flamingo's layers are attached to, and what it refuses."""

import copy

import pytest
import torch
from support.flamingo import attached, audio, batch
from support.oracles import build
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm.flamingo import attach_flamingo


def test_closed_gates_learn():
    """At the start the gates alone have gradients of the new parameters, so that they open."""
    model = build("llama", torch.float64).train()
    handle = attach_flamingo(model, 2)
    ids, mask = batch("left")
    model(ids, attention_mask=mask, labels=ids, audio=audio("prefix")).loss.backward()
    moved = {name for name, p in handle.layers.named_parameters() if p.grad.abs().sum() > 0}
    assert moved == {"1.attention_gate", "1.ffn_gate"}


@torch.no_grad()
def test_detach_and_save(tmp_path):
    """save_pretrained and detach leave a stock model; the new layers' state_dict goes into another attached one."""
    model, handle = attached(dtype=torch.float32)
    ids, mask = batch("left")
    state = audio("inserted", torch.float32)
    want = model(ids, attention_mask=mask, audio=state).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is LlamaForCausalLM
    other = attach_flamingo(again, 2)
    other.layers.load_state_dict(handle.layers.state_dict())
    torch.testing.assert_close(again(ids, attention_mask=mask, audio=state).logits, want)
    handle.detach()
    handle.detach()
    stock = build("llama")
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert set(model.__dict__) == set(stock.__dict__)
    attach(model).detach()


@torch.no_grad()
def test_copies_are_attached_models():
    """A deep copy has new layers of its own, and can be detached by itself."""
    model, _ = attached()
    ids, mask = batch("left")
    want = model(ids, attention_mask=mask, audio=audio("prefix")).logits
    other = copy.deepcopy(model)
    handle = other._palkernels_handle
    assert torch.equal(other(ids, attention_mask=mask, audio=audio("prefix")).logits, want)
    handle.layers["1"].ffn_gate.zero_()
    handle.detach()
    assert torch.equal(other(ids).logits, build("llama", torch.float64)(ids).logits)
    assert torch.equal(model(ids, attention_mask=mask, audio=audio("prefix")).logits, want)


def test_new_layers_follow_the_model():
    """Its dtype and device, its heads by default, trainable; none of them among its own parameters."""
    model = build("qwen3", torch.bfloat16)
    before = set(model.state_dict())
    handle = attach_flamingo(model, 3)
    assert list(handle.layers) == ["2"]
    assert handle.selected == (2,)
    assert (handle.config.heads, handle.config.head_dim, handle.config.ffn_multiplier) == (4, 24, 4)
    assert {p.dtype for p in handle.layers.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in handle.layers.parameters())
    assert set(model.state_dict()) == before
    empty = attach_flamingo(build("llama").to("meta"), 1)
    assert {p.device.type for p in empty.layers.parameters()} == {"meta"}


def test_two_attaches_are_refused():
    model = build("llama")
    attach_flamingo(model, 3)
    for again in (lambda: attach_flamingo(model, 3), lambda: attach(model), lambda: attach(model, LalConfig())):
        with pytest.raises(ValueError, match="the model must be detached before"):
            again()
    model._palkernels_handle.detach()
    attach(model)
    with pytest.raises(ValueError, match="must be detached before it is attached again, got a model attached by LalH"):
        attach_flamingo(model, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 4}, "every must be at most the model's 3 layers, got 4"),
        ({"every": 0}, "every must be a positive integer, got 0"),
        ({"heads": 0}, "heads must be a positive integer, got 0"),
        ({"activation": "step"}, "activation must be one that transformers knows, got 'step'"),
        ({"impl": "fast"}, "impl must be one of .*, got 'fast'"),
    ],
    ids=["every beyond", "every 0", "heads", "activation", "impl"],
)
def test_refuses_settings(settings, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        attach_flamingo(model, **({"every": 1} | settings))
    assert not hasattr(model, "_palkernels_handle")
    assert not model.model.layers[0]._forward_pre_hooks


def test_refuses_inputs():
    """What LAL refuses of audio is refused here in the same words."""
    model, _ = attached(every=1, dtype=torch.float32)
    ids, mask = batch("left")
    with pytest.raises(TypeError, match=r"audio states must have the model's dtype torch.float32, got torch.float64"):
        model(ids, audio=audio("prefix"))
    with pytest.raises(TypeError, match="audio must be an AudioState, got Tensor"):
        model(ids, audio=audio("prefix").states)
    behind = AudioState(audio("prefix", torch.float32).states, insert_at=torch.tensor([0, 5, 0]))
    with pytest.raises(ValueError, match=r"insert_at must be at most each text's length \[7, 4, 9\]"):
        model(ids, attention_mask=mask, use_cache=False, audio=behind)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient checkpointing must be non-reentrant with audio"):
        model(ids, audio=audio("prefix", torch.float32))
