"""PyTorch's operators for attention by Triton: schemas, shapes, and the derivative. Importing this needs no triton."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palkernels.arguments import FLOATS, Call
from palkernels.attention import launches, plans
from palkernels.operators import differentiate, final, operator
from palkernels.plans import geometry, usable

# The fields of a Call, in their order.
CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor audio_key, Tensor audio_value, "
    "Tensor? audio_lengths, Tensor? audio_index, Tensor? audio_visible_from, Tensor? text_start, Tensor? text_end, "
    "float scale, float? softcap, SymInt? window, "
    "Tensor? cu_seqlens=None, Tensor? cu_audio=None, SymInt? max_seqlen=None, SymInt? max_audio=None"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return launches.forward(Call(*arguments))


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needed: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    return launches.backward(Call(*arguments), out, lse, dout, dlse, needed)


def _fake_forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return launches.empty_outputs(query)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needed: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    floats = arguments[: len(FLOATS)]
    return [torch.empty_like(tensor) for need, tensor in zip(needed, floats, strict=True) if need]


lal_forward = operator("lal_forward", f"({CALL}) -> (Tensor, Tensor)", _forward, _fake_forward)
lal_backward = operator(
    "lal_backward",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needed, {CALL}) -> Tensor[]",
    _backward,
    _fake_backward,
)


class LalAttention(torch.autograd.Function):
    """The node of a call whose output and LSE have been computed."""

    @staticmethod
    def forward(ctx: Any, results: tuple[Tensor, Tensor], numbers: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)  # an unused LSE costs nothing
        ctx.numbers = numbers
        ctx.save_for_backward(*results, *tensors)  # as tensors, so that one changed before backward raises
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        nothing = (None,) * len(tensors)
        if dout is None and dlse is None:
            return None, None, *nothing
        needed = ctx.needs_input_grad[2 : 2 + len(FLOATS)]
        dout = torch.zeros_like(out) if dout is None else dout
        results = (out, lse, dout, dlse)
        with torch.no_grad():
            computed = _gradients(tuple(tensors), ctx.numbers, results, needed)
        gradients = iter(final(computed, (*tensors, *results)))
        return None, None, *(next(gradients) if need else None for need in needed), *nothing[len(FLOATS) :]


def with_node(
    results: tuple[Tensor, Tensor], tensors: Sequence[Tensor | None], numbers: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call as differentiable outputs.

    ``tensors`` are a :class:`Call`'s that are floats or integers, then those of packing; ``numbers`` likewise.
    """
    out, lse = LalAttention.apply(results, numbers, *tensors)
    return out, lse


def _with_node(results: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    return with_node(results, call.tensors(), call.numbers())


def _gradients(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    needed: tuple[bool, ...],
) -> list[Tensor]:
    """The gradients needed; ``results`` are the output, its LSE, and the gradients of both."""
    out, lse, dout, dlse = results
    operands = (*tensors, *results)
    seen = geometry(operands, (*numbers, *needed)) if usable() else None
    if seen is None:
        gradients: list[Tensor] = lal_backward(dout, dlse, out, lse, needed, *Call.of(tensors, numbers).arguments())
        return gradients
    plan = plans.BACKWARD.get(seen)
    repeated = None if plan is None else plan.run(operands)
    if repeated is not None:
        return repeated
    return launches.backward(Call.of(tensors, numbers), out, lse, dout, dlse, needed, seen, operands)


differentiate(lal_forward, _with_node)
