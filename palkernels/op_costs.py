"""Costs of the operators: FLOPs, the bytes that each needs while it runs, and the plain PyTorch that some of them run.

Each function's parameters have the names of the operator's schema. :func:`register_flop_formulas` tells
``torch.utils.flop_counter`` the FLOPs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from palkernels.arguments import Call
from palkernels.attention.ops import lal_backward, lal_forward
from palkernels.projection.ops import audio_kv_backward, audio_kv_forward, audio_kv_layers, backward, forward

# FLOPs


def _text_pairs(num_queries: int, num_keys: int, window: int | None) -> int:
    """Number of query-key pairs of one head of one row. Padding counts as text: shapes do not tell where it is."""
    window = num_keys if window is None else min(window, num_keys)
    first = num_keys - num_queries + 1  # keys up to the first query's own; each next query has one more
    growing = min(max(window - first + 1, 0), num_queries)  # queries before whose first key the window does not begin
    return growing * first + growing * (growing - 1) // 2 + (num_queries - growing) * window


def _pairs(call: Call) -> tuple[int, int]:
    """Pairs of a query and a text key, and pairs of a query and an audio token, of one head and all rows."""
    if call.cu_seqlens is None or call.cu_audio is None:
        text = _text_pairs(call.num_queries, call.num_keys, call.window)
        return call.num_batches * text, call.num_batches * call.num_queries * call.num_audio
    if is_fake(call.cu_seqlens) or call.cu_seqlens.is_meta:  # no lengths to read: every row as long as the longest
        texts, audios = [call.num_queries] * call.num_batches, [call.num_audio] * call.num_batches
    else:
        texts = call.cu_seqlens.diff().tolist()
        audios = call.cu_audio.diff().tolist()
        if call.audio_index is not None:
            audios = [audios[audio_row] for audio_row in call.audio_index.tolist()]
    audio = sum(text * tokens for text, tokens in zip(texts, audios, strict=True))
    return sum(_text_pairs(length, length, call.window) for length in texts), audio


def _product_flops(call: Call, pairs: int) -> int:
    """One matrix product over all pairs: 2 D operations for each."""
    return 2 * call.query.shape[1] * call.head_dim * pairs


def lal_forward_flops(*arguments: Any, **kwargs: Any) -> int:
    """Two products over all pairs: the scores, and the output."""
    call = Call(*arguments)
    return 2 * _product_flops(call, sum(_pairs(call)))


def lal_backward_flops(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needed: Sequence[bool], *arguments: Any, **kwargs: Any
) -> int:
    """The products that the gradients need, each once: S for all, dP for all but dV, one for each gradient."""
    call = Call(*arguments)
    text, audio = _pairs(call)
    of_query, of_key, of_value, of_audio_key, of_audio_value = needed
    keys = text * of_key + audio * of_audio_key
    values = text * of_value + audio * of_audio_value
    scores = (text + audio) if of_query else text * (of_key or of_value) + audio * (of_audio_key or of_audio_value)
    dscores = (text + audio) if of_query else keys
    return _product_flops(call, scores + dscores + (text + audio) * of_query + keys + values)


def _projection_flops(states: Tensor, weight: Tensor) -> int:
    """One product of all states with one weight (Hkv * D, d)."""
    return 2 * states.shape[0] * states.shape[1] * weight.numel()


def audio_kv_forward_flops(states: Tensor, norm_weight: Tensor, k_weight: Tensor, *rest: Any, **kwargs: Any) -> int:
    """Two products: the keys, and the values."""
    return 2 * _projection_flops(states, k_weight)


def audio_kv_backward_flops(
    dkey: Tensor | None,
    dvalue: Tensor | None,
    needed: Sequence[bool],
    states: Tensor,
    norm_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """A product for each weight's gradient, one each for what the states get from K and V, and the keys again where a
    norm follows them."""
    of_states, of_norm, of_k, of_v = needed[:4]
    products = (dkey is not None) * (of_k + (of_states or of_norm) + (k_norm_weight is not None))
    products += (dvalue is not None) * (of_v + (of_states or of_norm))
    return products * _projection_flops(states, k_weight)


def audio_kv_layers_flops(
    states: Tensor, norm_weight: Sequence[Tensor], k_weight: Sequence[Tensor], *rest: Any, **kwargs: Any
) -> int:
    """Two products for each layer."""
    return 2 * len(k_weight) * _projection_flops(states, k_weight[0])


FLOPS: dict[Any, Callable[..., int]] = {
    lal_forward: lal_forward_flops,
    lal_backward: lal_backward_flops,
    audio_kv_forward: audio_kv_forward_flops,
    audio_kv_backward: audio_kv_backward_flops,
    audio_kv_layers: audio_kv_layers_flops,
}


def register_flop_formulas(counter: ModuleType) -> None:
    """Tell ``torch.utils.flop_counter``, the module, how many FLOPs each operator computes."""
    for operator, flops in FLOPS.items():
        packet = operator.overloadpacket
        if packet not in counter.flop_registry:  # a package that is reloaded registers again
            counter.register_flop_formula(packet, get_raw=True)(flops)


# Scratch memory: what an operator allocates and frees while it runs by Triton, which no dispatch mode sees.


def _forward_scratch(*, states: Tensor, fused: bool, **rest: Any) -> int:
    """The normalised states."""
    return tensor_bytes(states) if fused else 0


def _backward_scratch(
    *, dkey: Tensor | None, dvalue: Tensor | None, needed: Sequence[bool], states: Tensor, fused: bool, **rest: Any
) -> int:
    """The gradients of keys and values, the states normalised again, and the gradient of the normalised states."""
    if not fused:
        return 0
    of_states, of_norm, of_k, of_v = needed[:4]
    upstream = sum(tensor_bytes(gradient) for gradient in (dkey, dvalue) if gradient is not None)
    return tensor_bytes(states) * ((of_k or of_v) + (of_states or of_norm)) + upstream


def _layers_scratch(*, states: Tensor, k_weight: Sequence[Tensor], **rest: Any) -> int:
    """The normalised states, and all layers' weights with the norms folded in."""
    return tensor_bytes(states) + sum(2 * tensor_bytes(weight) for weight in k_weight)


_SCRATCH: dict[Any, Callable[..., int]] = {
    audio_kv_forward: _forward_scratch,
    audio_kv_backward: _backward_scratch,
    audio_kv_layers: _layers_scratch,
}


def scratch_bytes(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> int:
    """Bytes that an operator allocates and frees while it runs by Triton; 0 for every other operator.

    Args:
        operator: what a dispatch mode is given: an overload, such as ``torch.ops.palkernels.audio_kv_forward.default``.
        args, kwargs: its arguments.
    """
    for ours, scratch in _SCRATCH.items():
        if operator is ours:
            return scratch(**arguments_by_name(operator, args, kwargs))
    return 0


def plain_function(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Callable[..., Any] | None:
    """The function of an operator that computes in plain PyTorch for these arguments; None for every other operator.

    Called in the operator's place it does the same, and a dispatch mode sees what it allocates.
    """
    plain: dict[Any, Callable[..., Any]] = {audio_kv_forward: forward, audio_kv_backward: backward}
    function = plain.get(operator)
    return None if function is None or arguments_by_name(operator, args, kwargs)["fused"] else function


def arguments_by_name(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An operator's arguments by the names of its schema."""
    names = (argument.name for argument in operator._schema.arguments)
    return dict(zip(names, args, strict=False)) | dict(kwargs or {})


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes; an expanded one takes less memory than it has elements."""
    elements = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return elements * tensor.element_size() if tensor.numel() else 0
