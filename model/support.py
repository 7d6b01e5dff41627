"""Which models can be attached: found out by looking at the layers and by running them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import PreTrainedModel

from palkernels.model.attention import project_audio, rotate

# RoPE whose frequencies depend on the longest position seen: audio and text would have to be rotated together.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
CHECK_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-8}


def find_decoder(model: PreTrainedModel) -> Any:
    """The stack of decoder layers; refuses what we cannot patch, by name."""
    name = type(model).__name__
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    missing = [part for part in ("layers", "rotary_emb") if not hasattr(decoder, part)]
    if not model.can_generate() or missing:
        what = f"its decoder has no {' and no '.join(missing)}" if missing else "it is not a causal LM"
        raise ValueError(f"attach must be given a causal LM like Llama or Qwen2, got {name}: {what}")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"attach must be given a causal LM like Llama or Qwen2, got {name}: its attention is fixed")
    return decoder


def check_rope(model: PreTrainedModel, rope: str) -> None:
    parameters = getattr(model.config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type")
    if rope == "sequence" and kind in LENGTH_DEPENDENT_ROPE:
        name = type(model).__name__
        raise ValueError(f'rope_type must not be {kind!r} for rope="sequence", got it in {name}: use rope="none"')


class _Captured(Exception):  # noqa: N818  (control flow, not an error)
    pass


class _CapturingCache:
    """Stands in for a cache and stops the layer's forward where it hands over K and V."""

    key: Tensor
    value: Tensor

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.key, self.value = key, value
        raise _Captured


def check_layer(model: PreTrainedModel, layer: nn.Module, rotary: nn.Module) -> None:
    """Run the layer itself on random states and compare the K and V it computes with ours."""
    name = type(model).__name__
    attention: Any = getattr(layer, "self_attn", None)
    missing = [part for part in ("k_proj", "v_proj", "config", "head_dim") if not hasattr(attention, part)]
    missing += [] if hasattr(layer, "input_layernorm") else ["input_layernorm"]
    if missing:
        raise ValueError(f"attach must be given a causal LM like Llama or Qwen2, got {name}: no {', '.join(missing)}")
    embedding: Any = model.get_input_embeddings()
    weight = embedding.weight
    if weight.is_meta or is_fake(weight):
        return
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    positions = torch.arange(4, device=weight.device).unsqueeze(0)
    cache: Any = _CapturingCache()
    with torch.no_grad():
        rotation = rotary(states, positions)
        try:
            layer.forward(states, position_ids=positions, past_key_values=cache, position_embeddings=rotation)
        except _Captured:
            key, value = project_audio(layer, states)
            ours = rotate(attention, key, rotation), value
        else:
            raise ValueError(f"attach must be given a causal LM like Llama or Qwen2, got {name}: it bypasses the cache")
    for what, got, want in zip(("keys", "values"), ours, (cache.key, cache.value), strict=True):
        tolerance = CHECK_TOLERANCE.get(want.dtype, 1e-2) * float(want.abs().max() + 1)
        if got.shape != want.shape or float((got - want).abs().max()) > tolerance:
            raise ValueError(f"attach must be given a causal LM like Llama or Qwen2, got {name}: its {what} differ")
