"""The fast path: audio keys and values by :func:`palkernels.audio_kv` where layers are plain; without gradients those
of all layers at once.

It reads weights, and so passes by whatever a module does besides: adapters, quantisation, sharding, hooks.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.module import _has_any_global_hook

from palkernels import audio_kv
from palkernels.model.causal_lm.layers import AudioKV, Rotation, num_kv_heads, qkv_sizes

NORM_OFFSETS = (0.0, 1.0)  # Gemma's norms multiply by 1 + weight


@dataclass(frozen=True)
class LayerCheck:
    """What the comparison of a layer's K and V with ours has shown."""

    norm_offset: float | None  # makes audio_kv compute what the layer's modules do; None: no offset does
    norms: tuple[Any, ...]  # :func:`describe_norms` of the layer at that time: other norms compute something else


class FastPath:
    """Says whether audio_kv may take the weights of the layers that see audio, as they are now.

    Args:
        layers: the model's decoder layers.
        checks: of the layers that see audio, by index; None where weights had no values to compare yet. The caller
            replaces these.
    """

    def __init__(self, layers: Sequence[nn.Module], checks: dict[int, LayerCheck | None]) -> None:
        self.layers = layers
        self.checks = checks

    def why_not(self) -> str | None:
        """Return why audio goes through each layer's modules, or None where audio_kv takes it."""
        for index in self.checks:
            reason = self._why_not_layer(index)
            if reason is not None:
                return f"layer {index}: {reason}"
        if not share_shapes([self.layers[index] for index in self.checks]) or len(self._norm_offsets()) > 1:
            return "the layers are not of one shape"
        return None

    def norm_offset(self, device_type: str) -> float | None:
        """Return the norm offset with which audio_kv projects in this forward, or None where the modules do."""
        if (
            not self.checks
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(device_type)
            or self.why_not() is not None
        ):
            return None
        return self._norm_offsets().pop()

    def _norm_offsets(self) -> set[float | None]:
        return {None if check is None else check.norm_offset for check in self.checks.values()}

    def _why_not_layer(self, index: int) -> str | None:
        layer, check = self.layers[index], self.checks[index]
        reason = why_not_plain(layer)
        if reason is not None:
            return reason
        if check is None:
            return "its weights had no values at attach, the first forward with audio compares them"
        if check.norms != describe_norms(layer):
            return "its norms are others than at attach"
        if check.norm_offset is None:
            return "audio_kv does not know its norm, its projections or its RoPE"
        return None


def describe_norms(layer: nn.Module) -> tuple[Any, ...]:
    """Return class and epsilon of the layer's norm and of its keys' norm."""
    norms = layer.input_layernorm, getattr(layer.self_attn, "k_norm", None)
    return tuple((type(norm), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))) for norm in norms)


def why_not_plain(layer: nn.Module) -> str | None:
    """Return what this layer's modules do besides multiplying by their weights, or None if nothing."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "all modules have hooks"
    attention: Any = layer.self_attn
    joined = hasattr(attention, "qkv_proj")
    linear = {"qkv_proj": attention.qkv_proj} if joined else {"k_proj": attention.k_proj, "v_proj": attention.v_proj}
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
            if parameter.is_meta:
                return f"{name} has weights that are on the meta device"
            if not (type(parameter) is nn.Parameter or is_fake(parameter)):
                return f"{name} has weights that are a {type(parameter).__name__}"
        if getattr(module, "weight", None) is None:
            return f"{name} has no weight"
    return None


def project_fused(
    layers: Sequence[nn.Module], states: Tensor, norm_offset: float, rotations: Sequence[Rotation | None], impl: str
) -> list[AudioKV]:
    """Project states (A, N, d) with the weights of plain layers, by one audio_kv.

    Args:
        rotations: of all layers, cos and sin (P or 1, N, R), or None for all: keys are not rotated.

    Returns:
        K and V of each layer, each (A, Hkv, N, D).
    """
    attentions: list[Any] = [layer.self_attn for layer in layers]
    keys, values, key_biases, value_biases = zip(*(_key_and_value(attention) for attention in attentions), strict=True)
    has_head_norm = hasattr(attentions[0], "k_norm")
    tables = [_tables(rotation) for rotation in rotations if rotation is not None]
    cos, sin = ([pair[i] for pair in tables] or None for i in (0, 1))
    audio_keys, audio_values = audio_kv(
        states,
        [layer.input_layernorm.weight for layer in layers],  # type: ignore[union-attr, misc]
        list(keys),
        list(values),
        num_kv_heads=num_kv_heads(attentions[0]),
        eps=norm_eps(layers[0].input_layernorm),
        norm_offset=norm_offset,
        k_bias=None if key_biases[0] is None else list(key_biases),
        v_bias=None if value_biases[0] is None else list(value_biases),
        k_norm_weight=[attention.k_norm.weight for attention in attentions] if has_head_norm else None,
        cos=cos,
        sin=sin,
        impl=impl,
    )
    return list(zip(audio_keys, audio_values, strict=True))


def norm_eps(norm: Any) -> float:
    """Return the epsilon of an RMS norm, which transformers' classes name differently."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def share_shapes(layers: Sequence[nn.Module]) -> bool:
    """Return whether one audio_kv can take all layers: their sizes, biases and epsilons are the same."""

    def shape(layer: Any) -> tuple[Any, ...]:
        attention = layer.self_attn
        key, value, *biases = _key_and_value(attention)
        has_biases = tuple(bias is not None for bias in biases)
        eps, has_head_norm = norm_eps(layer.input_layernorm), hasattr(attention, "k_norm")
        return attention.head_dim, key.shape, value.shape, has_biases, eps, has_head_norm

    return len({shape(layer) for layer in layers}) <= 1


def find_norm_offset(
    layer: nn.Module, states: Tensor, rotation: Rotation, expected: AudioKV, tolerance: float
) -> float | None:
    """Return the norm offset with which audio_kv gives the K and V that the layer's modules give, or None."""
    if why_not_plain(layer) is not None:
        return None
    attention: Any = layer.self_attn
    best, least_error = None, tolerance
    for offset in NORM_OFFSETS:
        try:
            if hasattr(attention, "k_norm") and norm_eps(attention.k_norm) != norm_eps(layer.input_layernorm):
                return None  # audio_kv has one for both
            (computed,) = project_fused([layer], states, offset, [rotation], "sdpa")
        except (AttributeError, TypeError, ValueError):  # a norm or a RoPE of another form
            return None
        errors = [relative_error(got, want) for got, want in zip(computed, expected, strict=True)]
        if all(error <= least_error for error in errors):
            best, least_error = offset, max(errors)
    return best


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, as a fraction of the largest value; infinity where shapes differ."""
    if got.shape != want.shape:
        return math.inf
    largest = max(float(want.abs().max()), sys.float_info.min)
    return float((got - want).abs().max()) / largest


def _key_and_value(attention: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return weights and biases of K and V; where one projection makes q, k and v, its rows for them."""
    if not hasattr(attention, "qkv_proj"):
        key, value = attention.k_proj, attention.v_proj
        return key.weight, value.weight, key.bias, value.bias
    sizes, bias = qkv_sizes(attention), attention.qkv_proj.bias
    _, key, value = attention.qkv_proj.weight.split(sizes)
    _, k_bias, v_bias = (None,) * 3 if bias is None else bias.split(sizes)
    return key, value, k_bias, v_bias


def _tables(rotation: Rotation) -> Rotation:
    """Return cos and sin as audio_kv takes them: (P, N, R), or (N, R) where all rows share one."""
    cos, sin = rotation
    return (cos[0], sin[0]) if cos.shape[0] == 1 else (cos, sin)
