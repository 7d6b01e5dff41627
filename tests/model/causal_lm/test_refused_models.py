"""Models that look like those which can be attached and compute something else, and settings that fit no model."""

import pytest
import torch
from support.attached import (
    tiny,
)
from support.oracles import build
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from palkernels.model import LalConfig, attach
from palkernels.model.causal_lm.caches import CACHE_KEYWORDS

SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))


def layers_changed(change):
    model = build("llama")
    layers = model.model.layers
    if change == "reordered":
        model.model.layers = torch.nn.ModuleList([layers[0], layers[2], layers[1]])
    elif change == "dropped":
        model.model.layers = layers[1:]
    else:
        layers[1].self_attn = layers[0].self_attn
    return model


def other_attention(doubled):
    """A layer that doubles what its k_proj or v_proj makes, or keys that it has cached."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Cache:
        def __init__(self, cache):
            self.cache = cache

        def update(self, key, value, *args, **kwargs):
            key, value = self.cache.update(key, value, *args, **kwargs)
            return key * 2, value

    class Other(LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            if doubled == "cached":
                keyword = next(keyword for keyword in CACHE_KEYWORDS if keyword in kwargs)
                return super().forward(hidden_states, **kwargs | {keyword: Cache(kwargs[keyword])})
            hook = getattr(self, doubled).register_forward_hook(lambda module, args, out: out * 2)
            try:
                return super().forward(hidden_states, **kwargs)
            finally:
                hook.remove()

    Other.__module__ = LlamaAttention.__module__
    model = build("llama")
    model.model.layers[1].self_attn.__class__ = Other
    return model


def composed():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"model_type": "clip_vision_model", "image_size": 2, "patch_size": 1}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=build("llama").config))


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (gpt2, {}, "got GPT2LMHeadModel: its decoder has no layers"),
        (lambda: other_attention("k_proj"), {}, "got LlamaForCausalLM: its keys differ"),
        (lambda: other_attention("v_proj"), {}, "got LlamaForCausalLM: its values differ"),
        (lambda: other_attention("cached"), {}, "got LlamaForCausalLM: a layer changes its keys or values after"),
        (lambda: LlamaForSequenceClassification(build("llama").config), {}, "Classification: it is not a causal LM"),
        (composed, {}, "got LlavaForConditionalGeneration: it is composed of several models"),
        (lambda: tiny("stablelm"), {}, "got StableLmForCausalLM: its attention function cannot be chosen"),
        (lambda: tiny("nemotron"), {}, "got NemotronForCausalLM: .* keywords do not reach its attention function"),
        (lambda: tiny("llama", rope_parameters=SECTIONS), {}, "got LlamaForCausalLM: its positions have several dim"),
        (lambda: tiny("gemma3_text", use_bidirectional_attention=True), {}, "its attention is not causal"),
        (lambda: tiny("qwen2", layer_types=["chunked_attention"] * 3), {}, "layer 0 is of type 'chunked_attention'"),
        (lambda: tiny("gpt_oss"), {}, "got GptOssForCausalLM: its attention takes s_aux"),
        (lambda: tiny("diffllama"), {}, "got DiffLlamaForCausalLM: a layer calls its attention function 2 times"),
        (lambda: tiny("doge"), {}, "got DogeForCausalLM: a layer changes its attention mask"),
        (
            lambda: tiny("qwen2_moe", use_sliding_window=True, sliding_window=4, max_window_layers=1),
            {},
            "got Qwen2MoeForCausalLM: layer 0 is of type 'sliding_attention' and gives its attention sliding_win",
        ),
        (lambda: tiny("phi"), {}, "got PhiForCausalLM: a layer"),
        (lambda: tiny("olmo", clip_qkv=8.0), {}, "got OlmoForCausalLM: it clips its keys and values"),
        (lambda: layers_changed("reordered"), {}, "got LlamaForCausalLM: layer 1 has the attention of layer 2"),
        (lambda: layers_changed("dropped"), {}, "got LlamaForCausalLM: layer 0 has the attention of layer 1"),
        (lambda: layers_changed("shared"), {"layers": (0,)}, "layer 1 has the attention of layer 0"),
        (lambda: tiny("hunyuan_v1_dense", head_dim=16), {}, "got HunYuanDenseV1ForCausalLM: its keys differ"),
        (
            lambda: tiny("smollm3", no_rope_layers=[1, 0, 1], initializer_range=0.001).bfloat16(),
            {},
            "got SmolLM3ForCausalLM: its keys differ",
        ),
        (lambda: build("llama"), {"layers": (0, 3)}, r"layers must be from 0 to 2, got \(0, 3\)"),
    ],
    ids=[
        *("gpt2", "other keys", "other values", "changed keys", "classifier", "composed", "fixed attention"),
        *(
            "no keywords",
            "sections",
            "bidirectional",
            "chunks",
            "sinks",
            "two calls",
            "own mask",
            "own window",
            "dense",
        ),
        *("clipped", "reordered", "dropped", "shared", "norm after rope", "small, no rope", "layers"),
    ],
)
def test_refused_models(make, config, message):
    model = make()
    before = {name: value for name, value in model.__dict__.items() if name in ("forward", "generate")}
    with pytest.raises(ValueError, match=message):
        attach(model, LalConfig(**config))
    assert {name: value for name, value in model.__dict__.items() if name in ("forward", "generate")} == before
    assert not hasattr(model, "_palkernels_handle")


def test_not_a_config():
    with pytest.raises(TypeError, match="config must be a LalConfig or a directory, got dict"):
        attach(build("llama"), {"layers": "all"})
    with pytest.raises(ValueError, match=r"all/lal.safetensors must be a file that handle.save wrote"):
        attach(build("llama"), "all")


def test_not_a_model():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "some"}, "layers must be"),
        ({"layers": (0, 0)}, "layers must be distinct integers"),
        ({"layers": (True,)}, "layers must be distinct integers"),
        ({"rope": "yes"}, "rope must be"),
        ({"impl": "flash"}, "impl must be one of"),
    ],
    ids=["layers by name", "layers twice", "layer of a bool", "rope", "impl"],
)
def test_invalid_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        LalConfig(**arguments)
