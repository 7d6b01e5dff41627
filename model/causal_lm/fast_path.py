"""The fast path: audio keys and values by :func:`palkernels.audio_kv`, where layers are plain enough; at inference
those of all layers at once.

It reads weights, and so passes by whatever a module does besides: adapters, quantisation, sharding, hooks.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import _has_any_global_hook

from palkernels import audio_kv
from palkernels.model.causal_lm.layers import AudioKV, Rotation, num_kv_heads, qkv_sizes

NORM_OFFSETS = (0.0, 1.0)  # Gemma's norms multiply by 1 + weight


@dataclass(frozen=True)
class Checked:
    """What comparing a layer's K and V with ours has shown."""

    offset: float | None  # of its norm, with which the fused path computes what its modules do; None: with none
    norms: tuple[Any, ...]  # what its norms were then: of another kind, they compute something else


def norms_of(layer: nn.Module) -> tuple[Any, ...]:
    """Class and epsilon of the layer's norm and its keys' norm."""
    norms = layer.input_layernorm, getattr(layer.self_attn, "k_norm", None)
    return tuple((type(norm), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))) for norm in norms)


def why_not_plain(layer: nn.Module) -> str | None:
    """Why this layer's weights say less than its modules do; None: they say it all."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "all modules have hooks"
    attention: Any = layer.self_attn
    fused = hasattr(attention, "qkv_proj")
    linear = {"qkv_proj": attention.qkv_proj} if fused else {"k_proj": attention.k_proj, "v_proj": attention.v_proj}
    modules: dict[str, Any] = {**linear, "input_layernorm": layer.input_layernorm}
    if hasattr(attention, "k_norm"):
        modules["k_norm"] = attention.k_norm
    for name, module in modules.items():
        if name in linear and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain Linear"
        if list(module.children()):
            return f"{name} has modules within"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name} has hooks"
        if "forward" in module.__dict__:
            return f"{name} has a forward of its own"
        for parameter in module.parameters():
            if not (type(parameter) is nn.Parameter or is_fake(parameter)) or parameter.is_meta:
                kind = "on the meta device" if parameter.is_meta else f"a {type(parameter).__name__}"
                return f"{name} has weights that are {kind}"
        if getattr(module, "weight", None) is None:
            return f"{name} has no weight"
    return None


def project_fused(
    layers: list[nn.Module], states: Tensor, offset: float, rotations: list[Rotation | None], impl: str
) -> list[AudioKV]:
    """K, rotated where a rotation (P or 1, N, R) is given, and V, each (A, Hkv, N, D), of plain layers."""
    attentions: list[Any] = [layer.self_attn for layer in layers]
    parts = [_key_and_value(attention) for attention in attentions]
    k_bias, v_bias = ([part[i] for part in parts] if parts[0][i] is not None else None for i in (2, 3))
    normed = hasattr(attentions[0], "k_norm")
    turned = rotations[0] is not None
    cos, sin = ([_turn(rotation, i) for rotation in rotations] if turned else None for i in (0, 1))
    keys, values = audio_kv(
        states,
        [layer.input_layernorm.weight for layer in layers],  # type: ignore[union-attr, misc]
        [key for key, _, _, _ in parts],
        [value for _, value, _, _ in parts],
        num_kv_heads=num_kv_heads(attentions[0]),
        eps=norm_eps(layers[0].input_layernorm),
        norm_offset=offset,
        k_bias=k_bias,
        v_bias=v_bias,
        k_norm_weight=[attention.k_norm.weight for attention in attentions] if normed else None,
        cos=cos,
        sin=sin,
        impl=impl,
    )
    return list(zip(keys, values, strict=True))


def norm_eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def alike(layers: list[nn.Module]) -> bool:
    """Whether one call can take them all: one set of sizes and epsilons."""

    def kind(layer: Any) -> tuple[Any, ...]:
        attention = layer.self_attn
        key, value, *biases = _key_and_value(attention)
        biased = tuple(bias is not None for bias in biases)
        normed = hasattr(attention, "k_norm")
        return attention.head_dim, key.shape, value.shape, biased, norm_eps(layer.input_layernorm), normed

    return len({kind(layer) for layer in layers}) <= 1


def find_offset(layer: nn.Module, states: Tensor, rotation: Rotation, want: AudioKV, tolerance: float) -> float | None:
    """The norm offset with which the fused path gives what the layer's modules give; None: with none."""
    if why_not_plain(layer) is not None:
        return None
    attention: Any = layer.self_attn
    found, least = None, tolerance
    for offset in NORM_OFFSETS:
        try:
            if hasattr(attention, "k_norm") and norm_eps(attention.k_norm) != norm_eps(layer.input_layernorm):
                return None  # audio_kv has one for both
            ((key, value),) = project_fused([layer], states, offset, [rotation], "sdpa")
        except (AttributeError, TypeError, ValueError):  # a norm or a RoPE of another form
            return None
        errors = [deviation(got, wanted) for got, wanted in zip((key, value), want, strict=True)]
        if all(error <= least for error in errors):
            found, least = offset, max(errors)
    return found


def deviation(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    if got.shape != want.shape:
        return math.inf
    largest = max(float(want.abs().max()), sys.float_info.min)
    return float((got - want).abs().max()) / largest


def _key_and_value(attention: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weights and biases of K and V; of one projection for q, k and v, the rows that are theirs."""
    if not hasattr(attention, "qkv_proj"):
        key, value = attention.k_proj, attention.v_proj
        return key.weight, value.weight, key.bias, value.bias
    sizes, bias = qkv_sizes(attention), attention.qkv_proj.bias
    _, key, value = attention.qkv_proj.weight.split(sizes)
    _, k_bias, v_bias = (None,) * 3 if bias is None else bias.split(sizes)
    return key, value, k_bias, v_bias


def _turn(rotation: Rotation | None, which: int) -> Tensor:
    assert rotation is not None  # all layers are rotated, or none
    table = rotation[which]
    return table[0] if table.shape[0] == 1 else table
