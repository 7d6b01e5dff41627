"""PyTorch operators over the Triton kernels: schema, shapes, autograd. Importing this needs no triton."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from palkernels.arguments import FLOATS, INTEGERS, PACKING, Call

# The fields of a Call, in their order.
CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor audio_key, Tensor audio_value, "
    "Tensor? audio_lengths, Tensor? audio_index, Tensor? audio_visible_from, Tensor? text_start, Tensor? text_end, "
    "float scale, float? softcap, SymInt? window, "
    "Tensor? cu_seqlens=None, Tensor? cu_audio=None, SymInt? max_seqlen=None, SymInt? max_audio=None"
)


@torch.library.custom_op("palkernels::lal_forward", mutates_args=(), schema=f"({CALL}) -> (Tensor, Tensor)")
def lal_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Attention output (B, Hq, T, D), laid out as (B, T, Hq, D), and its natural-log LSE (B, Hq, T)."""
    from palkernels.kernels import decode, forward

    call = Call(*arguments)
    out, lse = _empty_outputs(call.query)
    capability = _capability(call.query)
    launch = decode.decode_launch if decode.takes(call, capability) else forward.forward_launch
    launch(call, out, lse, capability).run()
    return out, lse


@torch.library.custom_op(
    "palkernels::lal_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needed, {CALL}) -> Tensor[]",
)
def lal_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needed: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    """Gradients of those of the five float tensors that are ``needed`` (five bools), in their order."""
    from palkernels.kernels.backward import backward_launches

    call = Call(*arguments)
    gradients = {
        name: torch.empty_like(tensor) if need else None
        for need, (name, tensor) in zip(needed, call.floats().items(), strict=True)
    }
    for launch in backward_launches(call, out, lse, dout, dlse, gradients, _capability(call.query)):
        launch.run()
    return [gradient for gradient in gradients.values() if gradient is not None]


@lal_forward.register_fake
def _(query: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query)


@lal_backward.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needed: Sequence[bool],
    *arguments: Any,
) -> list[Tensor]:
    floats = arguments[: len(FLOATS)]
    return [torch.empty_like(tensor) for need, tensor in zip(needed, floats, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # an unused LSE costs nothing
    call = Call(*inputs)
    tensors = dict.fromkeys((*FLOATS, *INTEGERS, *PACKING)) | call.floats() | call.integers()
    # The call keeps what is no tensor; the tensors are saved as such, so that one changed before backward raises.
    ctx.call = replace(call, **dict.fromkeys(tensors))  # type: ignore[arg-type]
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*output, *tensors.values())


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    call = replace(ctx.call, **dict(zip(ctx.names, tensors, strict=True)))
    needed = ctx.needs_input_grad[: len(FLOATS)]
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = iter(lal_backward(dout, dlse, out, lse, list(needed), *call.arguments()))
    return (
        *(next(gradients) if need else None for need in needed),
        *[None] * (len(ctx.needs_input_grad) - len(FLOATS)),
    )


lal_forward.register_autograd(_backward, setup_context=_setup_context)


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, head_dim = query.shape
    out = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.promote_types(query.dtype, torch.float32))
    return out, lse


def _capability(query: Tensor) -> int | None:
    from palkernels.kernels import launch, tiles

    return None if launch.INTERPRETED else tiles.capability(query.device)
