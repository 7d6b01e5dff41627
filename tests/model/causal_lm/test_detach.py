"""A model without audio and after detach is the stock one; attaching again, beside and around others."""

import inspect

import pytest
import torch
from support.attached import (
    attached,
    audio_state,
    batch,
    largest_difference,
    texts,
)
from support.oracles import FAMILIES, build

from palkernels.model import LalConfig, attach


@pytest.mark.parametrize(
    ("family", "attention"),
    # transformers 5.23 refuses to run Gemma2 on "sdpa"
    [
        (family, attention)
        for family in FAMILIES
        for attention in ("sdpa", "eager")
        if (family, attention) != ("gemma2", "sdpa")
    ],
)
@torch.no_grad()
def test_without_audio_and_after_detach_bitwise_stock(family, attention):
    model = build(family)
    model.set_attn_implementation(attention)
    _, padded, mask = batch(texts(), "left")
    stock = model(padded, attention_mask=mask).logits
    tokens = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    handle = attach(model, LalConfig(layers=(0, 2)))
    assert torch.equal(model(padded, attention_mask=mask).logits, stock)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False), tokens)
    with_audio = model(padded, attention_mask=mask, audio=audio_state("prefix", torch.float32)).logits
    assert not torch.equal(with_audio, stock)
    handle.detach()
    handle.detach()
    assert torch.equal(model(padded, attention_mask=mask).logits, stock)
    assert "forward" not in model.__dict__
    assert "audio" not in inspect.signature(model.forward).parameters


@torch.no_grad()
def test_what_wraps_an_attached_model_outlives_detach():
    """Hooks that accelerate puts on the model after attach stay; what they hold of ours is the stock model's."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Note(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(sorted(kwargs))
            return args, kwargs

    model, calls = build("llama"), []
    _, padded, _ = batch(texts(), "none")
    state = audio_state("prefix", torch.float32)
    stock = model(padded).logits
    tokens = model.generate(padded, max_new_tokens=2, do_sample=False)
    handle = attach(model)
    generate = model.generate
    with_audio = model(padded, audio=state).logits
    add_hook_to_module(model, Note())
    assert torch.equal(model(padded, audio=state).logits, with_audio)
    handle.detach()
    for _ in range(2):
        assert torch.equal(model(padded).logits, stock)
        assert torch.equal(generate(padded, max_new_tokens=2, do_sample=False), tokens)
        assert "audio" not in inspect.signature(model.forward).parameters
        for call in (model, generate):
            with pytest.raises(ValueError, match="is given audio, got it after detach"):
                call(padded, audio=state)
        again = attach(model)
        assert torch.equal(model(padded, audio=state).logits, with_audio)
        again.detach()
        remove_hook_from_module(model)
    assert ["audio"] in calls
    assert [] in calls


@torch.no_grad()
def test_accelerate_prepares_and_unwraps():
    """unwrap_model binds the forward that it finds to the model once more."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer before this test has said how it computes
    model, keywords = attached("llama", "inserted")
    want = model(**keywords).logits, model(keywords["input_ids"]).logits
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    assert 0 < largest_difference([prepared(**keywords).logits], [want[0]]) < 0.5  # in bfloat16
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**keywords).logits, want[0])
    assert torch.equal(unwrapped(keywords["input_ids"]).logits, want[1])
    unwrapped.generate(**keywords, max_new_tokens=2, do_sample=False)
    unwrapped._palkernels_handle.detach()
    assert torch.equal(unwrapped(keywords["input_ids"]).logits, want[1])


def test_attach_again():
    model = build("llama")
    handle = attach(model, LalConfig(layers=(0, 1)))
    assert attach(model, LalConfig(layers=[1, 0])) is handle
    with pytest.raises(ValueError, match="must be detached before another config"):
        attach(model, LalConfig())
    handle.detach()
    attach(model, LalConfig())
