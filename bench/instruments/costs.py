"""FLOPs and bytes of a block of PyTorch code, operation by operation, and the least time that a GPU needs for them.

An operation reads its inputs and writes its outputs once; it takes the longer of its arithmetic and its traffic.
Nothing is fused that PyTorch does not fuse. Views cost nothing; what is integer alone costs its launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from palkernels.bench.instruments.launches import our_launches, reads_value
from palkernels.bench.instruments.rates import GPUS
from palkernels.bench.instruments.trees import tensors_in
from palkernels.op_costs import arguments_by_name, tensor_bytes

__all__ = ["LAUNCHES", "CostCounter", "Costs"]

LAUNCHES = ("kernels", "our_kernels")  # what Costs count of launches
Arguments = dict[str, Any]  # of an operation, by the names of its schema
aten = torch.ops.aten

ATTENTION = ("_scaled_dot_product_", "lal_forward", "lal_backward")
# These allocate and compute nothing.
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
# These read no more of their arguments than they write.
SELECTIONS = (aten.embedding, aten.index_select, aten.index, aten.gather)
# These write their first argument without reading it.
OVERWRITES = (aten.zero_, aten.fill_, aten.copy_)


class Costs(Counter[str]):
    """Sums over operations: `attention_flops`, `other_flops`, `bytes`, seconds by each GPU's key, and launched
    `kernels`, of which `our_kernels` are this library's."""


class CostCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that counts what runs inside. `segments` has one entry for what comes before the first mark, and
    one for what follows each mark."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.segments = [Costs()]

    def mark(self) -> None:
        """Begin another segment."""
        self.segments.append(Costs())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        arguments = arguments_by_name(func, args, kwargs)
        written = _written(func, arguments, out)
        costs = self.segments[-1]
        launched = any(x.numel() for x in written) or reads_value(func)
        pytorch, ours = our_launches(func, args, kwargs) or (int(launched), 0)
        costs.update({"kernels": pytorch + ours, "our_kernels": ours})
        traffic = _traffic(func, arguments, written)
        if not traffic:
            return out
        flops = _flops(func, args, kwargs, out)
        part = "attention" if func._schema.name.partition("::")[2].startswith(ATTENTION) else "other"
        costs.update({f"{part}_flops": flops, "bytes": traffic})
        costs.update({name: gpu.within_reach.seconds(flops, traffic) for name, gpu in GPUS.items()})
        return out


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    if func._schema.name.startswith("aten::_scaled_dot_product_"):
        return _sdpa_flops(arguments_by_name(func, args, kwargs), backward="backward" in func._schema.name)
    count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=out)  # formulas are called as their operations are


def _sdpa_flops(arguments: Arguments, *, backward: bool) -> int:
    """Return the FLOPs of SDPA. PyTorch's own formula counts what a causal mask hides; no fused kernel computes it."""
    query, key = arguments["query"], arguments["key"]
    batch, heads, queries, head_dim = query.shape
    pairs = queries * key.shape[2]
    if arguments.get("is_causal"):
        pairs = queries * (queries + 1) // 2
    return int((10 if backward else 4) * batch * heads * head_dim * pairs)


def _written(func: Any, arguments: Arguments, out: Any) -> list[Tensor]:
    """Return the tensors that an operation changes or computes; views and allocations have none."""
    if func._overloadpacket in ALLOCATIONS:
        return []
    if func._schema.is_mutable:
        mutated = [x.name for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
        return tensors_in([arguments.get(name) for name in mutated])
    storages = {id(x.untyped_storage()) for x in tensors_in(arguments)}
    return [x for x in tensors_in(out) if id(x.untyped_storage()) not in storages]


def _traffic(func: Any, arguments: Arguments, outputs: list[Tensor]) -> int:
    """Return the bytes read and written, 0 for views and for operations on integers alone."""
    packet = func._overloadpacket
    inputs = tensors_in(arguments)
    if not outputs or not any(x.is_floating_point() for x in (*inputs, *outputs)):
        return 0
    written = sum(map(tensor_bytes, outputs))
    if packet in SELECTIONS:
        return 2 * written
    if packet is aten.nll_loss_forward:
        return 2 * tensor_bytes(arguments["target"])  # one probability for each of them
    if packet is aten.nll_loss_backward:
        return written
    if packet in OVERWRITES:
        inputs = tensors_in({name: x for name, x in arguments.items() if name != "self"})
    return written + sum(map(tensor_bytes, inputs))
