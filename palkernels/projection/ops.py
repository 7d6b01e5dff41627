"""PyTorch operators that make audio keys and values: RMSNorm, the K and V projections, head norm, RoPE.

The operator of one layer is differentiable and keeps nothing but its arguments for the backward pass, which normalises
again. In the operator of several layers, without gradients, all share one normalisation and one batched product: the
norms' weights are folded into the projections'. Importing this needs no triton.
"""

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from palkernels.arguments import PROJECTION, TURNS, Projection
from palkernels.operators import Node, differentiate, operator
from palkernels.plans import geometry, usable


def _steps(fused: bool) -> ModuleType:
    """The steps around the matrix products: Triton kernels, or plain PyTorch."""
    if fused:
        from palkernels.kernels import projection

        return projection
    from palkernels.projection import steps

    return steps


NUM_TENSORS = len(PROJECTION) + len(TURNS)
LAYER = (
    "Tensor states, Tensor norm_weight, Tensor k_weight, Tensor v_weight, Tensor? k_bias, Tensor? v_bias, "
    "Tensor? k_norm_weight, Tensor? cos, Tensor? sin, SymInt num_kv_heads, float eps, float norm_offset, bool fused"
)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """K and V (A, Hkv, N, D) of one layer, laid out as (A, N, Hkv, D)."""
    *layer, fused = arguments
    steps, call = _steps(fused), Projection(*layer)
    normalised = steps.normalise(call, call.norm_weight)
    keys = call.heads(linear(normalised, call.k_weight, call.k_bias))
    steps.finish_keys(keys, call)
    values = call.heads(linear(normalised, call.v_weight, call.v_bias))
    return keys.transpose(1, 2), values.transpose(1, 2)


def _fake_forward(states: Tensor, norm_weight: Tensor, k_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    heads = rest[-4]
    shape = (*states.shape[:2], heads, k_weight.shape[0] // heads)
    return states.new_empty(shape).transpose(1, 2), states.new_empty(shape).transpose(1, 2)


def backward(dkey: Tensor | None, dvalue: Tensor | None, needed: Sequence[bool], *arguments: Any) -> list[Tensor]:
    """Gradients of the tensors in ``PROJECTION`` that are ``needed`` (seven bools), in order.

    ``dkey`` and ``dvalue`` are (A, Hkv, N, D); at most one of them is None.
    """
    *layer, fused = arguments
    steps, call = _steps(fused), Projection(*layer)
    wants = dict(zip(PROJECTION, needed, strict=True))
    gradients: dict[str, Tensor | None] = {}
    num_rows = call.flat_states.shape[0]
    normalised: Tensor | None = None
    if wants["k_weight"] or wants["v_weight"] or (dkey is not None and call.k_norm_weight is not None):
        normalised = steps.normalise(call, call.norm_weight)

    dnormalised = None  # (A * N, d)
    wants_rows = wants["states"] or wants["norm_weight"]
    if dkey is not None:
        dkeys = dkey.transpose(1, 2)
        raw = None
        if call.k_norm_weight is not None:
            assert normalised is not None
            raw = call.heads(linear(normalised, call.k_weight, call.k_bias))
        dkeys, gradients["k_norm_weight"] = steps.finish_gradient(dkeys, raw, call)
        dkeys = dkeys.reshape(num_rows, call.k_weight.shape[0])
        if wants["k_bias"]:
            gradients["k_bias"] = dkeys.sum(0)
        if wants["k_weight"]:
            gradients["k_weight"] = dkeys.t() @ normalised
        if wants_rows:
            dnormalised = dkeys @ call.k_weight
    if dvalue is not None:
        dvalues = dvalue.transpose(1, 2).reshape(num_rows, call.v_weight.shape[0])
        if wants["v_bias"]:
            gradients["v_bias"] = dvalues.sum(0)
        if wants["v_weight"]:
            assert normalised is not None
            gradients["v_weight"] = dvalues.t() @ normalised
        if wants_rows:
            dnormalised = (
                dvalues @ call.v_weight if dnormalised is None else torch.addmm(dnormalised, dvalues, call.v_weight)
            )
    if wants_rows:
        dstates, gradients["norm_weight"] = steps.normalise_gradient(dnormalised, call, wants["norm_weight"])
        gradients["states"] = dstates.view(call.states.shape)
    # What only the keys depend on gets zeros where they have no gradient, and what only the values depend on likewise.
    return [
        torch.zeros_like(tensor) if (gradient := gradients.get(name)) is None else gradient.to(tensor.dtype)
        for name in PROJECTION
        if wants[name] and (tensor := getattr(call, name)) is not None
    ]


def _fake_backward(dkey: Tensor | None, dvalue: Tensor | None, needed: Sequence[bool], *arguments: Any) -> list[Tensor]:
    tensors = arguments[: len(PROJECTION)]
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for need, x in zip(needed, tensors, strict=True)
        if need and x is not None
    ]


audio_kv_forward = operator("audio_kv_forward", f"({LAYER}) -> (Tensor, Tensor)", forward, _fake_forward)
audio_kv_backward = operator(
    "audio_kv_backward",
    f"(Tensor? dkey, Tensor? dvalue, bool[] needed, {LAYER}) -> Tensor[]",
    backward,
    _fake_backward,
)


class AudioKv(Node):
    """The node of one layer's keys and values. It keeps the arguments and nothing else."""


def direct(*arguments: Any) -> tuple[Tensor, Tensor]:
    """What the operator ``audio_kv_forward`` returns, without PyTorch's dispatcher: for plain tensors."""
    with torch.no_grad():
        results = forward(*arguments)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:NUM_TENSORS]):
        return with_node(results, arguments)
    return results


def with_node(results: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer as differentiable outputs; the arguments are the operator's."""
    tensors, numbers = arguments[:NUM_TENSORS], arguments[NUM_TENSORS:]
    key, value = AudioKv.apply(results, partial(_gradients, numbers), (), *tensors)
    return key, value


def _gradients(
    numbers: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    upstream: tuple[Tensor | None, Tensor | None],
    needed: tuple[bool, ...],
) -> list[Tensor]:
    is_plain = usable() and geometry((*tensors, *upstream), ()) is not None
    compute = backward if is_plain else audio_kv_backward
    gradients: list[Tensor] = compute(*upstream, needed[: len(PROJECTION)], *tensors, *numbers)
    return gradients


differentiate(audio_kv_forward, with_node)


LAYERS = (
    "Tensor states, Tensor[] norm_weight, Tensor[] k_weight, Tensor[] v_weight, Tensor?[] k_bias, Tensor?[] v_bias, "
    "Tensor?[] k_norm_weight, Tensor?[] cos, Tensor?[] sin, SymInt num_kv_heads, float eps, float norm_offset"
)


def layers_forward(states: Tensor, *arguments: Any) -> Tensor:
    """K and V of L layers, (L, 2, A, N, Hkv, D), without gradients, by the Triton steps."""
    *lists, num_kv_heads, eps, norm_offset = arguments
    numbers = (num_kv_heads, eps, norm_offset)
    layers = [Projection(*(states, *layer, *numbers)) for layer in zip(*lists, strict=True)]
    steps, first = _steps(fused=True), layers[0]
    normalised = steps.normalise(first, None)
    weights = first.k_weight.new_empty(len(layers), 2, *first.k_weight.shape)
    for layer, folded in zip(layers, weights, strict=True):
        gain = layer.norm_weight.to(torch.promote_types(layer.norm_weight.dtype, torch.float32)) + norm_offset
        torch.mul(layer.k_weight, gain, out=folded[0])
        torch.mul(layer.v_weight, gain, out=folded[1])
    products = torch.bmm(normalised.expand(2 * len(layers), -1, -1), weights.flatten(0, 1).transpose(1, 2))
    out = products.view(len(layers), 2, *states.shape[:2], num_kv_heads, first.head_dim)
    for layer, (keys, values) in zip(layers, out, strict=True):
        for projected, bias in ((keys, layer.k_bias), (values, layer.v_bias)):
            if bias is not None:
                projected += bias.view(num_kv_heads, -1)
        steps.finish_keys(keys, layer)
    return out


def _fake_layers(states: Tensor, norm_weight: list[Tensor], k_weight: list[Tensor], *rest: Any) -> Tensor:
    heads = rest[-3]
    return states.new_empty(len(k_weight), 2, *states.shape[:2], heads, k_weight[0].shape[0] // heads)


audio_kv_layers = operator("audio_kv_layers", f"({LAYERS}) -> Tensor", layers_forward, _fake_layers)
