"""Calls that need no checks any more: what a call looks like, and when a launch may be repeated for one that looks so.

The first call of its kind is checked, compiled and launched by Triton; the launch is kept, made ready, under the call's
:func:`geometry`. Whatever else changes how a call is carried out makes :func:`usable` say no: that call takes the long
way, through PyTorch's dispatcher and Triton's binder.
"""

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from palkernels import devices

MOST_PLANS = 2048  # in one collection; beyond that the oldest go
ALIGNMENT = 16  # bytes: Triton compiles another kernel for pointers that are not multiples of it

Plan = TypeVar("Plan")


# Not a function of torch.autograd's that its stubs know.
_is_profiled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


class Plans(Generic[Plan]):
    """Plans by the geometry that they are for. Threads may share it; a forked process starts with none."""

    def __init__(self) -> None:
        self.forget()
        _collections.add(self)

    def forget(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self.get: Callable[[Hashable], Plan | None] = self._plans.get
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def keep(self, geometry: Hashable, plan: Plan) -> None:
        with self._lock:
            while len(self._plans) >= MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[geometry] = plan


_collections: "weakref.WeakSet[Plans[Any]]" = weakref.WeakSet()


def forget_all() -> None:
    """Start anew, as a process does."""
    for plans in list(_collections):
        plans.forget()


os.register_at_fork(after_in_child=forget_all)  # a thread of the parent's may hold a lock for ever


def usable() -> bool:
    """Whether plans may be made and used now, as far as it does not depend on the call.

    Not while torch.compile traces, nor while something wants to see the operator: dispatch and function modes, function
    transforms, forward-mode differentiation, PyTorch's profiler. And not with PALKERNELS_CHECK=1, which has values
    checked in every call.
    """
    if torch.compiler.is_compiling():
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and _functions_are_watched())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _is_profiled()
        or torch._C._is_tracing()
        or os.environ.get("PALKERNELS_CHECK") == "1"
    )


def _functions_are_watched() -> bool:
    """Whether there is a function mode that does more than choose the device of new tensors."""
    modes = [torch._C._get_function_stack_at(level) for level in range(torch._C._len_torch_function_stack())]
    return any(type(mode) is not DeviceContext for mode in modes)


class Geometry(NamedTuple):
    """All of a call that a launch depends on, but for the pointers."""

    signatures: tuple[Any, ...]  # of each tensor its shape, strides, dtype and device
    numbers: tuple[Any, ...]
    types: tuple[type, ...]  # of the numbers: True and 1.0 equal 1, and are refused where 1 is not
    autocast: torch.dtype | None  # that would convert the tensors


def geometry(tensors: Sequence[Tensor | None], numbers: tuple[Any, ...]) -> Geometry | None:
    """The geometry of a call, whose first tensor is not None; None where a pointer does not tell the values.

    That is so of subclasses, which may hold anything, of tensors whose negation is put off, and of those without
    strides; and of tensors on which no kernel runs.
    """
    kind = devices.kernel_device
    signatures: list[Hashable] = []
    try:
        hash(numbers)
        if tensors[0].device.type != kind:  # type: ignore[union-attr]
            return None
        for tensor in tensors:
            if tensor is None:
                signatures.append(None)
            elif (type(tensor) is Tensor or type(tensor) is Parameter) and not (
                tensor.is_neg() or tensor._is_zerotensor()
            ):
                signatures.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
            else:
                return None
    except (AttributeError, RuntimeError, TypeError):  # no tensor; without strides or a shape; a list for a number
        return None
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return Geometry(tuple(signatures), numbers, tuple(map(type, numbers)), autocast)
