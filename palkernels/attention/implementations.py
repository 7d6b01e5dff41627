"""What computes a prepared call of attention: the Triton kernels, PyTorch's fused kernels, or the definition."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from palkernels import reference
from palkernels.arguments import Call
from palkernels.attention import checks, ops, packed, sdpa
from palkernels.attention.parts import Settings
from palkernels.recompute import instead_of_saving


def run(call: Call, impl: str) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, T, D) and LSE (B, Hq, T) by "triton", "sdpa" or "reference".

    Raises:
        NotImplementedError: forward-mode tangents with "triton".
    """
    compute = _COMPUTE[impl]
    if call.cu_seqlens is not None and impl != "triton":
        compute = partial(packed.row_by_row, attention=compute)
    if torch.compiler.is_compiling():
        return compute(call)
    with instead_of_saving(call.audio_key, call.audio_value):
        return compute(call)


def tangent_reasons(call: Call) -> list[str]:
    """Why the Triton kernels raise on forward-mode tangents.

    Where no input requires a gradient, PyTorch would drop the tangents without a word.
    """
    if torch.compiler.is_compiling():
        return []
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    dual = [name for name, tensor in call.floats().items() if unpack(tensor).tangent is not None]
    return [f"impl='triton' must not be given forward-mode tangents, got them for {dual}"] if dual else []


def _by_triton(call: Call) -> tuple[Tensor, Tensor]:
    for reason in tangent_reasons(call):
        raise NotImplementedError(reason)
    out, lse = ops.lal_forward(*call.arguments())
    return out, lse


def _by_sdpa(call: Call) -> tuple[Tensor, Tensor]:
    call = checks.clamped(call)
    return sdpa.merged_attention(*call.floats().values(), settings=Settings(**call.options()))


def _by_definition(call: Call) -> tuple[Tensor, Tensor]:
    call = checks.clamped(call)
    result: tuple[Tensor, Tensor] = reference.lal_attention(*call.floats().values(), **call.options(), return_lse=True)
    return result


_COMPUTE = {"triton": _by_triton, "sdpa": _by_sdpa, "reference": _by_definition}
