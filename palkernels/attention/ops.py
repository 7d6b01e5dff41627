"""PyTorch's operators for attention by Triton: schemas, shapes, and the derivative. Importing this needs no triton."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from palkernels.arguments import FLOATS, Call
from palkernels.attention import launches, plans
from palkernels.operators import Node, differentiate, operator
from palkernels.plans import geometry, usable

# The fields of a Call, in their order.
CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor audio_key, Tensor audio_value, "
    "Tensor? audio_lengths, Tensor? audio_index, Tensor? audio_visible_from, Tensor? text_start, Tensor? text_end, "
    "float scale, float? softcap, SymInt? window, "
    "Tensor? cu_seqlens=None, Tensor? cu_audio=None, SymInt? max_seqlen=None, SymInt? max_audio=None, "
    "Tensor? audio_key_scale=None, Tensor? audio_value_scale=None"
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


class LalAttention(Node):
    """The node of a call of attention."""


def with_node(
    results: tuple[Tensor, Tensor], tensors: Sequence[Tensor | None], numbers: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call as differentiable outputs; ``tensors`` and ``numbers`` are a :class:`Call`'s."""
    out, lse = LalAttention.apply(results, partial(_gradients, numbers), results, *tensors)
    return out, lse


def _with_node(results: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    call = Call(*arguments)
    if call.audio_key_scale is not None:
        raise NotImplementedError("audio in float8_e4m3fn must be given where no gradient is required, got one that is")
    return with_node(results, call.tensors(), call.numbers())


def _gradients(
    numbers: tuple[Any, ...],
    saved: tuple[Tensor, ...],
    upstream: tuple[Tensor | None, Tensor | None],
    needed: tuple[bool, ...],
) -> list[Tensor]:
    """The gradients that are needed, of the float tensors, from the output, its LSE and a call's tensors."""
    out, lse, *tensors = saved
    dout, dlse = upstream
    dout = torch.zeros_like(out) if dout is None else dout
    needed = needed[: len(FLOATS)]
    operands = (*tensors, out, lse, dout, dlse)
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
