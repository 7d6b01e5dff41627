"""Projections that are no plain Linear layers: peft's adapters and virtual tokens, quantised weights."""

import pytest
import torch
from support.oracles import build
from support.training import inputs

from palkernels.model import AudioState, LalConfig, attach


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("recompute", [False, True])
def test_lora(family, attached, recompute):
    """Adapters act on audio: tokens and gradients are those of the model that has them merged into its weights."""
    from peft import LoraConfig, get_peft_model

    targets = ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = build(family, torch.float64)
    config = LalConfig(recompute_audio_kv=recompute)
    if attached == "before":
        attach(model, config)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    handle = attach(adapted, config)
    assert "not a plain Linear" in str(handle.report())
    ids, states, insert_at = inputs()
    state = AudioState(states, insert_at=insert_at)
    adapted.train()(input_ids=ids, labels=ids, audio=state).loss.backward()
    downs = {name: module for name, module in adapted.named_modules() if name.endswith(".lora_A.default")}
    ours = {name.removesuffix(".lora_A.default"): module.weight.grad.clone() for name, module in downs.items()}
    ups = {name: adapted.get_submodule(f"{name}.lora_B.default").weight.detach().clone() for name in ours}
    assert len(ours) == 3 * len(targets)
    options = {"input_ids": ids, "audio": state, "max_new_tokens": 3, "do_sample": False}
    tokens = adapted.eval().generate(**options)

    handle.detach()
    merged = adapted.merge_and_unload()
    attach(merged)
    assert torch.equal(merged.generate(**options), tokens)
    merged.requires_grad_(True).train()
    merged(ids, labels=ids, audio=state).loss.backward()
    for name, gradient in ours.items():  # W + 2 B A, so dA = 2 B^T dW
        weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        torch.testing.assert_close(gradient, 2.0 * ups[name].T @ weight.grad)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_generation_with_virtual_tokens_is_refused(kind, attached):
    """peft's prompt learning prepares generation itself: audio would be lost or be put in the wrong place."""
    import peft

    model = build("llama")
    if attached == "before":
        attach(model)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(model, config).eval()
    handle = attach(adapted)
    ids, states, _ = inputs(torch.float32)
    options = {"input_ids": ids, "audio": AudioState(states), "max_new_tokens": 2, "do_sample": False}
    message = (
        "must run the text that was prepared|must be given one cache, got cache and past_key_values"
        if attached == "before"
        else "no forward of this generate took the audio|must be given one cache, got cache and past_key_values"
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        adapted.generate(**options)
    if attached == "before":
        model.generate(**options)
        return
    with pytest.raises(RuntimeError, match="prepare_inputs_for_generation must be the one that attach made"):
        model.generate(**options)  # peft has put the stock one back
    handle.detach()
    attach(model)
    model.generate(**options)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(bits):
    """bitsandbytes' layers project the audio by their own forward: near the model with their weights as floats."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    model, floats = build("llama"), build("llama")
    for layer, plain in zip(model.model.layers, floats.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(plain.self_attn, name).weight
            sizes = weight.shape[1], weight.shape[0]
            if bits == 8:
                new = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                new.load_state_dict({"weight": weight.detach()})
                new = new.to("cpu")
            else:
                new = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bitsandbytes.nn.Params4bit(weight.detach().clone(), requires_grad=False, quant_type="nf4")
                new = new.to("cpu")
                weight.data = dequantize_4bit(new.weight.data, new.weight.quant_state).view_as(weight)
            setattr(layer.self_attn, name, new)
    handle = attach(model)
    attach(floats)
    kind = "Linear8bitLt" if bits == 8 else "Linear4bit"
    assert f"k_proj is a {kind}, not a plain Linear" in str(handle.report())
    ids, states, insert_at = inputs(torch.float32)
    state = AudioState(states.requires_grad_(), insert_at=insert_at)
    got, want = (x(ids, audio=state).logits for x in (model, floats))
    assert float((got - want).detach().abs().max()) <= (
        0.2 if bits == 8 else 1e-4
    )  # 8 bits round what they multiply, too
    got.square().mean().backward()
    assert states.grad.abs().max() > 0
