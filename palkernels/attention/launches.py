"""Attention by Triton's launches. Importing this needs no triton, which is imported when the first kernel runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from palkernels import devices
from palkernels.arguments import Call
from palkernels.attention import plans
from palkernels.plans import Geometry

Tensors = Sequence[Tensor | None]


def forward(call: Call, seen: Geometry | None = None, tensors: Tensors = ()) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, T, D), laid out as (B, T, Hq, D), and LSE (B, Hq, T) of a prepared call.

    Where ``seen``, the call's geometry, is given, the launch is kept for calls that look alike; ``tensors`` are then
    the caller's, in the order of :class:`Call`.
    """
    from palkernels.attention import repetition
    from palkernels.kernels import decode
    from palkernels.kernels.forward import forward_launch
    from palkernels.kernels.gluon import choice
    from palkernels.kernels.ready import repeatable

    out, lse = empty_outputs(call.query)
    capability = _capability(call.query)
    if decode.takes(call, capability):
        # Not an operator, whose memory may be that of a CUDA graph: torch.compile runs it there before it captures.
        uses_kept = seen is not None and repeatable(devices.index(call.query.device))
        launch = decode.decode_launch(call, out, lse, capability, uses_kept=uses_kept)
    elif choice.takes(call, capability):
        from palkernels.kernels.gluon.forward import gluon_forward_launch

        launch = gluon_forward_launch(call, out, lse)
    else:
        launch = forward_launch(call, out, lse, capability)
    compiled = launch.run()
    if seen is not None and compiled is not None:
        plan = repetition.forward_plan(tensors, call, launch, compiled, out, lse)
        if plan is not None:
            plans.keep(seen, tensors, plan)
    return out, lse


def backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needed: Sequence[bool],
    seen: Geometry | None = None,
    tensors: Tensors = (),
) -> list[Tensor]:
    """Gradients of those of the five float tensors that are ``needed`` (five bools), in their order.

    With ``seen`` the launches are kept, as by :func:`forward`; ``tensors`` are the call's, ``out``, ``lse``, ``dout``
    and ``dlse``.
    """
    from palkernels.attention import repetition
    from palkernels.kernels.backward import backward_launches
    from palkernels.kernels.statistics import empty_statistics

    gradients = {
        name: torch.empty_like(tensor) if need else None
        for need, (name, tensor) in zip(needed, call.floats().items(), strict=True)
    }
    lse = lse.contiguous()  # as it was; who saved it meanwhile may have laid it out anew
    capability = _capability(call.query)
    statistics = empty_statistics(call, lse, capability)
    launches = backward_launches(call, out, lse, dout, dlse, statistics, gradients, capability)
    compiled = [launch.run() for launch in launches]
    if seen is not None and None not in compiled:
        plan = repetition.backward_plan((*tensors, statistics, *gradients.values()), needed, launches, compiled)
        if plan is not None:
            plans.BACKWARD.keep(seen, plan)
    return [gradient for gradient in gradients.values() if gradient is not None]


def empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, head_dim = query.shape
    out = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.promote_types(query.dtype, torch.float32))
    return out, lse


def _capability(query: Tensor) -> int | None:
    from palkernels.kernels import launch, tiles

    return None if launch.INTERPRETED else tiles.capability(query.device)
