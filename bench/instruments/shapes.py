"""Models of any size on any machine: floating-point tensors have shapes and no values.

Under :class:`Shapes` the real code of a model runs, operation by operation. Integers and booleans (token ids, lengths,
masks, whether generation has ended) are computed as ever, so code that asks for their values gets the true ones.
Floating-point tensors are PyTorch's fake tensors, which take no memory and no time. Integers made from them, such as
the most probable tokens, are zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from palkernels.bench.instruments.trees import tensors_in

__all__ = ["Shapes"]


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager; models and inputs must be made inside. Tensors may be used in it again later."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._reads_zeros = False

    @contextlib.contextmanager
    def zeros_for_values(self) -> Iterator[None]:
        """Let numbers that are read from floating-point tensors be 0.0, for constructors that ask for rates: CLAP's
        does, of the layers that it drops in training."""
        self._reads_zeros = True
        try:
            yield
        finally:
            self._reads_zeros = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.equal.default and isinstance(args[0], FakeTensor):
            return True  # for code that asks whether it may save work on ones or zeros
        if func is torch.ops.aten._local_scalar_dense.default and self._reads_zeros and isinstance(args[0], FakeTensor):
            return 0.0
        inputs = tensors_in((args, kwargs))
        if any(isinstance(x, FakeTensor) for x in inputs):
            with self._fake:
                out = func(*args, **kwargs)
            return tree_map_only(FakeTensor, _with_values_if_integer, out)
        if not inputs:  # the real one could be too large to be made
            with self._fake:
                made = func(*args, **kwargs)
            if isinstance(made, FakeTensor) and made.is_floating_point():
                return made
        return tree_map_only(Tensor, self._without_values_if_floating, func(*args, **kwargs))

    def _without_values_if_floating(self, tensor: Tensor) -> Tensor:
        return self._fake.from_tensor(tensor) if tensor.is_floating_point() else tensor


def _with_values_if_integer(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else torch.zeros(tensor.shape, dtype=tensor.dtype)
