"""Copies of an attached model: deep ones, pickled ones, saved ones."""

import copy

import torch
from support.attached import (
    audio_state,
    batch,
    texts,
)
from support.oracles import build
from transformers import (
    LlamaForCausalLM,
)

from palkernels.model import attach


@torch.no_grad()
def test_two_models_and_a_copy_stay_apart():
    """Each attached model projects audio with its own weights, a deep copy included."""
    first = build("llama")
    _, padded, _ = batch(texts(), "none")
    state = audio_state("prefix", torch.float32)
    attach(first)
    second = copy.deepcopy(first)
    want = first(padded, audio=state).logits
    assert torch.equal(second(padded, audio=state).logits, want)
    second.model.layers[0].self_attn.k_proj.weight.zero_()
    assert not torch.equal(second(padded, audio=state).logits, want)
    assert torch.equal(first(padded, audio=state).logits, want)


def test_a_pickled_model_stays_attached(tmp_path):
    first = build("llama")
    _, padded, _ = batch(texts(), "none")
    state = audio_state("prefix", torch.float32)
    attach(first)
    torch.save(first, tmp_path / "model.pt")
    second = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(second(padded, audio=state).logits, first(padded, audio=state).logits)
        second._palkernels_handle.detach()
        assert not torch.equal(second(padded).logits, first(padded, audio=state).logits)


def test_save_pretrained_saves_a_stock_model(tmp_path):
    model = build("llama")
    attach(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    _, padded, _ = batch(texts(), "none")
    with torch.no_grad():
        assert torch.equal(again(padded).logits, model(padded).logits)
