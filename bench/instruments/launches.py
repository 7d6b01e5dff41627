"""How many kernels an operation launches on a GPU: PyTorch's, and this library's Triton kernels.

An operation of PyTorch that writes something is one kernel, a value that the host reads one copy; views, allocations
and questions about a tensor are none. Few operations launch more than one. An operator of this library has the
launches of its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from palkernels.kernels.tiles import splits_key_gradient
from palkernels.op_costs import arguments_by_name

__all__ = ["our_launches", "reads_value"]

Launches = tuple[int, int]  # of PyTorch's kernels, and of ours
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")


def reads_value(func: Any) -> bool:
    """Return whether an operation copies a value to the host."""
    return func._schema.name in READS


def our_launches(func: Any, args: Sequence[Any], kwargs: Any = None) -> Launches | None:
    """Return what one of this library's operators launches where it runs by Triton; None for every other operation."""
    count = _OURS.get(func._schema.name)
    return None if count is None else count(**arguments_by_name(func, args, kwargs))


def _forward(**_: Any) -> Launches:
    return 0, 1


def _backward(*, query: Tensor, needed: Sequence[bool], **_: Any) -> Launches:
    """dQ, which leaves what the keys' gradient needs, and dK and dV, which part at wide heads."""
    of_key, of_value, of_audio_key, of_audio_value = needed[1:]
    keys, values = of_key or of_audio_key, of_value or of_audio_value
    split = keys and values and splits_key_gradient(query.shape[-1])
    return 0, any(needed) + (keys or values) + split


def _project(*, k_norm_weight: Tensor | None, cos: Tensor | None, **_: Any) -> Launches:
    """The norm, two products, and what finishes the keys."""
    return 2, 1 + _finishes(k_norm_weight, cos)


def _project_backward(
    *,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    needed: Sequence[bool],
    norm_weight: Tensor,
    k_norm_weight: Tensor | None,
    cos: Tensor | None,
    **_: Any,
) -> Launches:
    states, norm, k_weight, v_weight, k_bias, v_bias, k_norm = needed
    rows = states or norm
    products = sums = 0
    if dkey is not None:
        products += k_weight + rows + (k_norm_weight is not None)
        sums += k_bias + (k_norm_weight is not None)
    if dvalue is not None:
        products += v_weight + rows
        sums += v_bias
    casts = (norm + (k_norm and dkey is not None)) * _is_narrow(norm_weight)
    zeros = (dkey is None) * (k_weight + k_bias + k_norm) + (dvalue is None) * (v_weight + v_bias)
    ours = (k_weight or v_weight or (dkey is not None and k_norm_weight is not None)) + rows
    ours += dkey is not None and _finishes(k_norm_weight, cos)
    return products + sums + norm + casts + zeros, ours


def _project_layers(
    *,
    norm_weight: Sequence[Tensor],
    k_bias: Sequence[Tensor | None],
    v_bias: Sequence[Tensor | None],
    k_norm_weight: Sequence[Tensor | None],
    cos: Sequence[Tensor | None],
    **_: Any,
) -> Launches:
    """One norm and one product for all layers; each layer's weights are folded and its keys finished by themselves."""
    folds = sum(3 + _is_narrow(weight) for weight in norm_weight)
    biases = sum(bias is not None for bias in (*k_bias, *v_bias))
    return 1 + folds + biases, 1 + sum(map(_finishes, k_norm_weight, cos))


def _finishes(k_norm_weight: Tensor | None, cos: Tensor | None) -> bool:
    return k_norm_weight is not None or cos is not None


def _is_narrow(weight: Tensor) -> bool:
    """Return whether float32 sums are cast to the weight's dtype, or the weight to float32."""
    return weight.dtype in (torch.float16, torch.bfloat16)


_OURS: dict[str, Callable[..., Launches]] = {
    "palkernels::lal_forward": _forward,
    "palkernels::lal_backward": _backward,
    "palkernels::audio_kv_forward": _project,
    "palkernels::audio_kv_backward": _project_backward,
    "palkernels::audio_kv_layers": _project_layers,
}
