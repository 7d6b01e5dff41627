"""What a decoder layer makes of audio: its own norm, its own K and V projections, its own RoPE."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

AudioKV = tuple[Tensor, Tensor]
Rotation = tuple[Tensor, Tensor]


def project_audio(layer: nn.Module, states: Tensor) -> AudioKV:
    """Apply a layer's own norm and projections to states (A, N, d).

    Modules are called, not their weights read, so that adapters, quantisation, sharding and hooks act on audio too.

    Returns:
        K, not rotated, and V, both (A, Hkv, N, D).
    """
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(states)  # type: ignore[operator]
    if hasattr(attention, "qkv_proj"):
        _, *projected = attention.qkv_proj(normed).split(qkv_sizes(attention), -1)
    else:
        projected = [attention.k_proj(normed), attention.v_proj(normed)]
    key, value = (part.unflatten(-1, (-1, attention.head_dim)) for part in projected)
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def head_dim_of(config: Any) -> int:
    """Return the size of one head, from a transformers config that may not state it."""
    head_dim: int | None = getattr(config, "head_dim", None)
    return head_dim or config.hidden_size // config.num_attention_heads


def num_kv_heads(attention: Any) -> int:
    """Return the number of key heads of an attention module, Hkv."""
    heads: int = attention.config.num_attention_heads // attention.num_key_value_groups
    return heads


def qkv_sizes(attention: Any) -> list[int]:
    """Return the columns of q, k and v where one projection makes all three."""
    heads = attention.config.num_attention_heads, *[num_kv_heads(attention)] * 2
    return [count * attention.head_dim for count in heads]


def rotate(attention: nn.Module, key: Tensor, rotation: Rotation) -> Tensor:
    """Apply RoPE to keys (A, Hkv, N, D) by the model's own function."""
    no_queries = key[:, :0]  # the function rotates queries and keys together
    rotated: tuple[Tensor, Tensor] = modeling_file(attention).apply_rotary_pos_emb(no_queries, key, *rotation)
    return rotated[1]


def modeling_file(attention: nn.Module) -> Any:
    """Return the modeling file of this attention, which holds its RoPE and its eager attention.

    Sharding and parametrisation derive a class of their own from the attention's, elsewhere.
    """
    in_transformers = (base for base in type(attention).__mro__ if base.__module__.startswith("transformers"))
    return sys.modules[next(in_transformers, type(attention)).__module__]


class Rotary:
    """A model's rotary embedding, for audio positions. Some models have one set of frequencies per layer type."""

    # RoPE whose frequencies depend on the longest position: audio and text must be given the same one.
    LENGTH_DEPENDENT = ("dynamic", "longrope")

    def __init__(self, module: nn.Module, config: Any, num_layers: int) -> None:
        self.module = module
        by_type = "layer_type" in inspect.signature(module.forward).parameters
        types = getattr(config, "layer_types", None) if by_type else None
        self.layer_types: tuple[str | None, ...] = tuple(types) if types else (None,) * num_layers
        parameters = getattr(config, "rope_parameters", None) or {}
        sets = list(parameters.values()) if by_type else [parameters]
        self.depends_on_length = any((x or {}).get("rope_type") in self.LENGTH_DEPENDENT for x in sets)
        ends = [x["original_max_position_embeddings"] for x in sets if (x or {}).get("rope_type") == "longrope"]
        self.changes_behind: int | None = min(ends, default=None)  # positions, where the frequencies change but once
        self.several_dimensions = any("mrope_section" in (x or {}) for x in sets)

    def of_layer(self, layer: int, like: Tensor, positions: Tensor) -> Rotation:
        """Return cos and sin, each (P, N, R), at positions (P, N) for one layer, in the dtype of ``like``."""
        layer_type = self.layer_types[layer]
        arguments = (like, positions) if layer_type is None else (like, positions, layer_type)
        rotation: Rotation = self.module(*arguments)
        return rotation

    def of_layers(
        self, layers: tuple[int, ...], like: Tensor, positions: Tensor, longest: Tensor | None
    ) -> tuple[Rotation | None, ...]:
        """Return cos and sin at positions (P, N) for every layer of the model, None for those not in ``layers``.

        ``longest`` is the largest position in the text, needed only where RoPE depends on it.
        """
        if longest is not None:
            last = longest.expand(positions.shape[0], 1)
            positions = torch.cat([torch.minimum(positions, longest), last], dim=1)
        by_type: dict[str | None, Rotation] = {}
        for layer in layers:
            layer_type = self.layer_types[layer]
            if layer_type not in by_type:
                cos, sin = self.of_layer(layer, like, positions)
                by_type[layer_type] = (cos, sin) if longest is None else (cos[:, :-1], sin[:, :-1])
        return tuple(by_type[x] if i in layers else None for i, x in enumerate(self.layer_types))
