"""FLOPs and bytes of a block of PyTorch code, operation by operation, and the least time that a GPU needs for them.

An operation reads its inputs and writes its outputs once; it takes the longer of its arithmetic and its traffic.
Nothing is fused that PyTorch does not fuse. Views cost nothing, nor does what is integer alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from palkernels.op_costs import plain_function as function_inside
from palkernels.op_costs import scratch_bytes

__all__ = ["GPUS", "CostCounter", "Costs", "Gpu", "function_inside", "scratch_bytes"]

Arguments = dict[str, Any]  # of an operation, by name
aten = torch.ops.aten


@dataclass(frozen=True)
class Gpu:
    """What a GPU does per second, as published, and the shares of it that are within reach."""

    name: str
    flops: float  # 16-bit matrix products
    bytes: float

    # An H200 reached 790 TFLOP/s and 4.3 TB/s with one large product and one large copy (bench/LOG.md).
    FLOPS_WITHIN_REACH = 0.8
    BYTES_WITHIN_REACH = 0.9

    def seconds(self, flops: float, traffic: float) -> float:
        """The least time of one operation."""
        return max(flops / (self.FLOPS_WITHIN_REACH * self.flops), traffic / (self.BYTES_WITHIN_REACH * self.bytes))


# NVIDIA's data sheets, without sparsity.
GPUS = {
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
    "h200": Gpu("NVIDIA H200", 989e12, 4.8e12),
}

ATTENTION = ("_scaled_dot_product_", "lal_forward", "lal_backward")
# Of these, what is read or written is not the whole of an argument.
ROWS_ALONE = (aten.embedding, aten.index_select, aten.index, aten.gather)


class Costs(Counter[str]):
    """`attention_flops`, `other_flops`, `bytes`, `kernels`, and seconds by the GPU's key."""


class CostCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager: counts what runs inside. `segments` has an entry for what comes before the first mark, and one
    for what follows each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.segments = [Costs()]

    def mark(self) -> None:
        self.segments.append(Costs())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        traffic = _traffic(func, args, kwargs, out)
        if not traffic:
            return out
        flops = _flops(func, args, kwargs, out)
        kind = "attention" if func._schema.name.partition("::")[2].startswith(ATTENTION) else "other"
        costs = self.segments[-1]
        costs.update({f"{kind}_flops": flops, "bytes": traffic, "kernels": 1})
        costs.update({name: gpu.seconds(flops, traffic) for name, gpu in GPUS.items()})
        return out


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    if func._schema.name.startswith("aten::_scaled_dot_product_"):
        return _sdpa_flops(_by_name(func, args, kwargs), backward="backward" in func._schema.name)
    count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


def _sdpa_flops(given: Arguments, *, backward: bool) -> int:
    """PyTorch's own formula counts what a causal mask hides, which no fused kernel computes."""
    query, key = given["query"], given["key"]
    batch, heads, rows, head_dim = query.shape
    pairs = rows * key.shape[2]
    if given.get("is_causal"):
        pairs = rows * (rows + 1) // 2
    return int((10 if backward else 4) * batch * heads * head_dim * pairs)


def _traffic(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes read and written, 0 for views and for operations on integers alone."""
    inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    outputs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
    if not any(x.is_floating_point() for x in (*inputs, *outputs)):
        return 0
    mutates = func._schema.is_mutable
    if not mutates:
        storages = {id(x.untyped_storage()) for x in inputs}
        outputs = [x for x in outputs if id(x.untyped_storage()) not in storages]
        if not outputs:
            return 0  # a view
    packet = func._overloadpacket
    if packet in (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided):
        return 0
    written = sum(map(_bytes, outputs))
    if mutates:
        written = sum(_bytes(x) for x in _written(func, args, kwargs))
    if packet in ROWS_ALONE:
        return 2 * written
    if packet is aten.nll_loss_forward:
        return 2 * _bytes(inputs[1])
    if packet is aten.nll_loss_backward:
        return written
    if packet in (aten.zero_, aten.fill_, aten.copy_):
        inputs = inputs[1:]
    return written + sum(map(_bytes, inputs))


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    given = _by_name(func, args, kwargs)
    names = [x.name for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    return [x for x in tree_iter([given.get(name) for name in names]) if isinstance(x, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor takes less memory than it has elements."""
    elements = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return elements * tensor.element_size() if tensor.numel() else 0


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    return dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | dict(kwargs)
