"""Adapters that drop out: a model that is in training already when it first hears audio."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from support.oracles import build
from support.training import inputs

from palkernels.model import AudioState, attach


def test_first_forward_in_training():
    """The layers' check compares two runs of a projection, in which other values would be dropped; it draws no random
    numbers, either, so that a run that is resumed draws the same ones."""
    model = build("llama", torch.float32).train()
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, model)
    ids, states, insert_at = inputs(torch.float32)
    before = torch.get_rng_state()
    handle = attach(model)
    handle.check_layers()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert torch.isfinite(model(ids, labels=ids, audio=AudioState(states, insert_at=insert_at)).loss)
