"""PyTorch operators over the Triton kernels: schema and shapes only, so that importing this needs no triton."""

import torch
from torch import Tensor


@torch.library.custom_op("palkernels::lal_forward", mutates_args=())
def lal_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    audio_lengths: Tensor | None,
    audio_index: Tensor | None,
    audio_visible_from: Tensor | None,
    text_start: Tensor | None,
    text_end: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, Hq, T, D), laid out as (B, T, Hq, D), and its natural-log LSE (B, Hq, T)."""
    from palkernels.kernels import forward

    out, lse = _empty_outputs(query)
    forward.lal_forward(
        query,
        key,
        value,
        audio_key,
        audio_value,
        audio_lengths,
        audio_index,
        audio_visible_from,
        text_start,
        text_end,
        scale,
        softcap,
        window,
        out,
        lse,
    )
    return out, lse


@lal_forward.register_fake
def _(query: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query)


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, num_queries, head_dim = query.shape
    out = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.promote_types(query.dtype, torch.float32))
    return out, lse
