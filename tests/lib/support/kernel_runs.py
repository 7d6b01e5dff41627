"""Run the kernels with their gradients, in Triton's interpreter or on a GPU."""

import contextlib

import pytest
import torch

from palkernels import lal_attention
from palkernels.kernels import statistics
from palkernels.testing import LalCase
from support import eager, interpreter


def attention(case: LalCase, impl: str, seed: int = 0, with_lse: bool = True) -> list[torch.Tensor]:
    """Return output, LSE and the five gradients, for random upstream gradients that are the same in every dtype.

    "eager" as impl is PyTorch's own arithmetic in the dtype: see support/eager.py.
    """
    case = case.requires_grad()
    if impl == "eager":
        out, lse = eager.attention(case)
    else:
        out, lse = lal_attention(*case.tensors, **case.options, return_lse=True, impl=impl)
    generator = torch.Generator().manual_seed(seed)
    douts = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse)]
    results = [out, lse] if with_lse else [out]
    return [out.detach(), lse.detach(), *torch.autograd.grad(results, case.tensors, douts[: len(results)])]


def arithmetic(dtype, device):
    """Return the context in which the kernels can compute in this dtype: the interpreter alone has no bfloat16."""
    return interpreter.bfloat16() if dtype == torch.bfloat16 and device == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def nan_statistics():
    """Fill the memory of the rows' statistics with NaN first: none may be read that has not been written."""
    empty = statistics.empty_statistics
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(statistics, "empty_statistics", lambda *arguments: empty(*arguments).fill_(float("nan")))
        yield


@contextlib.contextmanager
def strict(device):
    """Raise where an offset overflows, if the kernels run in the interpreter."""
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(interpreter.overflow_checks())
            stack.enter_context(interpreter.without_copies())
        yield
