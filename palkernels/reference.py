"""The definition of LAL attention: concatenate, mask, one softmax.

Plain PyTorch in any floating dtype, differentiable by autograd; imports torch alone. Everything else in this library
is measured against these functions in float64. They favour being read over being fast: the keys are concatenated, the
heads expanded, and the whole (B, Hq, T, N + S) score matrix is held.
"""

from typing import Literal, overload

import torch
from torch import Tensor


def lal_mask(
    batch: int,
    num_queries: int,
    num_keys: int,
    num_audio: int,
    *,
    audio_lengths: Tensor | None = None,
    audio_visible_from: Tensor | None = None,
    text_start: Tensor | None = None,
    text_end: Tensor | None = None,
    window: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """What each query sees: bool (B, T, N + S), audio keys first.

    Query t sits at key position ``p = text_end - T + t``. It sees text key s iff ``text_start <= s <= p`` and,
    with a window, ``s > p - window``; and audio key j iff ``j < audio_lengths`` and
    ``audio_visible_from[j] <= p``. The lengths here are per text row, (B,).

    T = S = 4, N = 3, one padded text key (``text_start = 1``), audio of length 2 inserted before the third key
    (``audio_visible_from = 2``)::

              audio   text
        p=0   0 0 0   0 0 0 0     a query that sees nothing gives output 0 and LSE -inf
        p=1   0 0 0   0 1 0 0
        p=2   1 1 0   0 1 1 0
        p=3   1 1 0   0 1 1 1
    """

    def column(values: Tensor | None, default: int) -> Tensor:
        if values is None:
            values = torch.full((batch,), default, device=device)
        return values.to(device=device, dtype=torch.int64).view(batch, 1, 1)

    offset = column(text_end, num_keys) - num_queries
    position = offset + torch.arange(num_queries, device=device).view(1, -1, 1)
    key = torch.arange(num_keys, device=device).view(1, 1, -1)
    text = (key >= column(text_start, 0)) & (key <= position)
    if window is not None:
        text &= key > position - window

    token = torch.arange(num_audio, device=device).view(1, 1, -1)
    audio = (token < column(audio_lengths, num_audio)).expand(batch, num_queries, num_audio)
    if audio_visible_from is not None:
        audio = audio & (audio_visible_from.to(torch.int64).unsqueeze(1) <= position)
    return torch.cat([audio, text], dim=2)


@overload
def lal_attention(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *,
    audio_lengths: Tensor | None = ..., audio_index: Tensor | None = ..., audio_visible_from: Tensor | None = ...,
    audio_key_scale: Tensor | None = ..., audio_value_scale: Tensor | None = ..., text_start: Tensor | None = ...,
    text_end: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., window: int | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def lal_attention(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *,
    audio_lengths: Tensor | None = ..., audio_index: Tensor | None = ..., audio_visible_from: Tensor | None = ...,
    audio_key_scale: Tensor | None = ..., audio_value_scale: Tensor | None = ..., text_start: Tensor | None = ...,
    text_end: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., window: int | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def lal_attention(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *,
    audio_lengths: Tensor | None = ..., audio_index: Tensor | None = ..., audio_visible_from: Tensor | None = ...,
    audio_key_scale: Tensor | None = ..., audio_value_scale: Tensor | None = ..., text_start: Tensor | None = ...,
    text_end: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., window: int | None = ..., return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def lal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    audio_lengths: Tensor | None = None,
    audio_index: Tensor | None = None,
    audio_visible_from: Tensor | None = None,
    audio_key_scale: Tensor | None = None,
    audio_value_scale: Tensor | None = None,
    text_start: Tensor | None = None,
    text_end: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`palkernels.lal_attention` by its definition; the same arguments without ``impl``.

    All in float32 (float64 for float64 inputs); the output is rounded to the inputs' dtype once, at the end. What no
    query sees is never used: it may hold NaN.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_audio = audio_key.shape[2]
    group = num_heads // key.shape[1]
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value, audio_key, audio_value = (x.to(wide) for x in (query, key, value, audio_key, audio_value))
    if audio_key_scale is not None:
        audio_key = audio_key * audio_key_scale[:, :, None, None]
    if audio_value_scale is not None:
        audio_value = audio_value * audio_value_scale[:, :, None, None]
    if num_audio + key.shape[2] == 0:  # no keys, so no queries either
        out = query.to(dtype, copy=True)
        return (out, query.sum(-1)) if return_lse else out
    if audio_index is not None:
        rows = audio_index.to(torch.int64)
        audio_key, audio_value = audio_key[rows], audio_value[rows]
        audio_lengths = None if audio_lengths is None else audio_lengths[rows]

    mask = lal_mask(
        batch,
        num_queries,
        key.shape[2],
        num_audio,
        audio_lengths=audio_lengths,
        audio_visible_from=audio_visible_from,
        text_start=text_start,
        text_end=text_end,
        window=window,
        device=query.device,
    )
    unseen_key = ~mask.any(dim=1)[:, None, :, None]
    blind_query = ~mask.any(dim=2)[:, None, :, None]
    mask = mask.unsqueeze(1)

    query = query.masked_fill(blind_query, 0)
    all_keys = torch.cat([audio_key, key], dim=2).masked_fill(unseen_key, 0).repeat_interleave(group, dim=1)
    all_values = torch.cat([audio_value, value], dim=2).masked_fill(unseen_key, 0).repeat_interleave(group, dim=1)

    scores = query @ all_keys.transpose(2, 3)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))

    peak = scores.detach().amax(dim=-1, keepdim=True).masked_fill(blind_query, 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True).masked_fill(blind_query, 1)
    out = (weights / total @ all_values).to(dtype)
    # (B, T, Hq, D) in memory, so that the transpose Hugging Face does next is free.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    if not return_lse:
        return out
    lse = (peak + torch.log(total)).masked_fill(blind_query, float("-inf"))
    return out, lse.squeeze(-1)


@overload
def lal_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *, cu_seqlens: Tensor,
    cu_audio: Tensor, max_seqlen: int, max_audio: int, audio_index: Tensor | None = ...,
    audio_visible_from: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    window: int | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def lal_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *, cu_seqlens: Tensor,
    cu_audio: Tensor, max_seqlen: int, max_audio: int, audio_index: Tensor | None = ...,
    audio_visible_from: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    window: int | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def lal_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *, cu_seqlens: Tensor,
    cu_audio: Tensor, max_seqlen: int, max_audio: int, audio_index: Tensor | None = ...,
    audio_visible_from: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    window: int | None = ..., return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def lal_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_audio: Tensor,
    max_seqlen: int,
    max_audio: int,
    audio_index: Tensor | None = None,
    audio_visible_from: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`palkernels.lal_attention_varlen` by its definition: :func:`lal_attention` of each row, on its own.

    ``max_seqlen`` and ``max_audio`` say nothing that ``cu_seqlens`` and ``cu_audio`` do not say.
    """
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value, audio_key, audio_value = (x.to(wide) for x in (query, key, value, audio_key, audio_value))
    outs, lses = [query[:0]], [query.new_empty(query.shape[1], 0)]
    for batch in range(cu_seqlens.shape[0] - 1):
        audio_row = batch if audio_index is None else int(audio_index[batch])
        text = slice(int(cu_seqlens[batch]), int(cu_seqlens[batch + 1]))
        audio = slice(int(cu_audio[audio_row]), int(cu_audio[audio_row + 1]))
        out, lse = lal_attention(
            *(tensor[text].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)),
            *(tensor[audio].transpose(0, 1).unsqueeze(0) for tensor in (audio_key, audio_value)),
            audio_visible_from=None if audio_visible_from is None else audio_visible_from[audio].unsqueeze(0),
            scale=scale,
            softcap=softcap,
            window=window,
            return_lse=True,
        )
        outs.append(out.squeeze(0).transpose(0, 1))
        lses.append(lse.squeeze(0))
    out, lse = torch.cat(outs).to(dtype), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def audio_kv(
    states: Tensor,
    norm_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    *,
    num_kv_heads: int,
    eps: float,
    norm_offset: float = 0.0,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`palkernels.audio_kv` of one layer by its definition.

    All in float32 (float64 for float64 states), rounded once, at the end.
    """
    dtype, shape = states.dtype, (*states.shape[:2], num_kv_heads, k_weight.shape[0] // num_kv_heads)
    wide = torch.promote_types(dtype, torch.float32)

    def rms_norm(values: Tensor, weight: Tensor) -> Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + norm_offset)

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = normed @ weight.to(wide).transpose(0, 1)
        return (projected if bias is None else projected + bias.to(wide)).view(shape)

    normed = rms_norm(states.to(wide), norm_weight)
    key, value = project(k_weight, k_bias), project(v_weight, v_bias)
    if k_norm_weight is not None:
        key = rms_norm(key, k_norm_weight)
    if cos is not None and sin is not None:
        cos, sin = (x.to(wide).unsqueeze(-2) for x in (cos, sin))  # (N or A, N, 1, R)
        turned, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]
        low, high = turned.chunk(2, dim=-1)
        key = torch.cat([turned * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)
    return key.to(dtype).transpose(1, 2), value.to(dtype).transpose(1, 2)
