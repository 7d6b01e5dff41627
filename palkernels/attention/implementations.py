"""What computes a prepared call of attention: the Triton kernels, PyTorch's fused kernels, or the definition."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from palkernels import reference
from palkernels.arguments import FLOATS, Call
from palkernels.attention import checks, launches, ops, packed, plans, scales, sdpa
from palkernels.attention.parts import Settings
from palkernels.plans import Geometry
from palkernels.recompute import are_views, instead_of_saving

_requires_grad = attrgetter("requires_grad")


def repeat(seen: Geometry, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor] | None:
    """Output and LSE by the launches of an earlier call of this geometry; None where there are none to repeat.

    ``tensors`` are the caller's, in the order of :class:`Call`. That call was checked, and chose Triton.
    """
    audio_key, audio_value = tensors[3:5]
    if are_views(audio_key, audio_value):  # type: ignore[arg-type]
        return None  # to be refused
    plan = plans.FORWARD.get(seen) or plans.derive(seen, tensors)
    if plan is None:
        return None
    wants_gradients = torch.is_grad_enabled() and any(map(_requires_grad, tensors[: len(FLOATS)]))
    if tensors[scales.FIRST] is not None and scales.want_gradients(tensors, wants_gradients):
        return None  # to be refused
    results = plan.run(tensors)
    if results is None or not wants_gradients:
        return results
    with instead_of_saving(audio_key, audio_value):  # type: ignore[arg-type]
        return ops.with_node(results, (*tensors, None, None), plan.numbers)


def run(
    call: Call, impl: str, seen: Geometry | None = None, tensors: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, T, D) and LSE (B, Hq, T) by "triton", "sdpa" or "reference".

    With ``seen``, the geometry of the caller's ``tensors``, Triton's launch is kept for :func:`repeat`.

    Raises:
        NotImplementedError: forward-mode tangents or function transforms with "triton".
    """
    compute = partial(_by_triton, seen=seen, tensors=tensors) if impl == "triton" else _COMPUTE[impl]
    if call.cu_seqlens is not None and impl != "triton":
        compute = partial(packed.row_by_row, attention=compute)
    if torch.compiler.is_compiling():
        return compute(call)
    with instead_of_saving(call.audio_key, call.audio_value):
        return compute(call)


def transform_reasons(call: Call) -> list[str]:
    """Why the Triton kernels raise on forward-mode tangents and under torch.func's transforms.

    Where no input requires a gradient, PyTorch would drop the tangents without a word.
    """
    if torch.compiler.is_compiling():
        return []
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    tensors = call.floats() | call.scales()
    dual = [name for name, tensor in tensors.items() if unpack(tensor).tangent is not None]
    if dual:
        return [f"impl='triton' must not be given forward-mode tangents, got them for {dual}"]
    wrapped = [name for name, x in tensors.items() if torch._C._functorch.is_functorch_wrapped_tensor(x)]
    return [f"impl='triton' must not be transformed by torch.func, got transformed {wrapped}"] if wrapped else []


def _by_triton(call: Call, seen: Geometry | None, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    for reason in transform_reasons(call):
        raise NotImplementedError(reason)
    if seen is None:
        out, lse = ops.lal_forward(*call.arguments())
        return out, lse
    results = launches.forward(call, seen, tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in call.floats().values()):
        return ops.with_node(results, call.tensors(), call.numbers())
    return results


def _by_sdpa(call: Call) -> tuple[Tensor, Tensor]:
    call = scales.dequantised(checks.clamped(call))
    return sdpa.merged_attention(*call.floats().values(), settings=Settings(**call.options()))


def _by_definition(call: Call) -> tuple[Tensor, Tensor]:
    call = checks.clamped(call)
    options = call.options() | call.scales()
    result: tuple[Tensor, Tensor] = reference.lal_attention(*call.floats().values(), **options, return_lse=True)
    return result


_COMPUTE = {"sdpa": _by_sdpa, "reference": _by_definition}
