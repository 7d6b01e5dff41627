"""LAL attention, forward: one pass over the audio keys, then over the text keys, from two pointers.

The query heads that share a K/V head are packed into the tile's rows (row = t * GROUP + g), so each key and value is
loaded once for the whole group. Audio needs no causal test: its loop is maskless but for the last, partial block,
unless tokens have a first visible position.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from palkernels.kernels import tiles
from palkernels.kernels.primitives import LN_2, attend_block

# Decided when the kernels are defined: setting the variable later does not reach them.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_audio", "num_audio_rows", "window"])
def lal_forward_kernel(
    q_ptr,  # (B, Hkv * GROUP, T, D)
    k_ptr,  # (B, Hkv, S, D)
    v_ptr,
    ak_ptr,  # (A, Hkv, N, D)
    av_ptr,
    out_ptr,  # (B, Hkv * GROUP, T, D), any strides
    lse_ptr,  # (B, Hkv * GROUP, T), contiguous
    lengths_ptr,  # (A,)   or None, as all pointers below
    index_ptr,  # (B,)
    visible_ptr,  # (B, N)
    start_ptr,  # (B,)
    end_ptr,  # (B,)
    window,  # int or None
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_akb,
    stride_akh,
    stride_akt,
    stride_akd,
    stride_avb,
    stride_avh,
    stride_avt,
    stride_avd,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_od,
    stride_visible_b,
    stride_visible_n,
    num_queries,
    num_keys,
    num_audio,
    num_audio_rows,
    num_kv_heads,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    # One program: BLOCK_M packed rows of one (text row, K/V head). Neighbours share their keys in the L2 cache.
    num_tiles = tl.cdiv(num_queries * GROUP, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    kv_head = (tl.program_id(0) // num_tiles % num_kv_heads).to(tl.int64)
    batch = (tl.program_id(0) // num_tiles // num_kv_heads).to(tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_ok = t < num_queries

    text_end = num_keys
    if end_ptr is not None:
        text_end = tl.minimum(tl.maximum(tl.load(end_ptr + batch), num_queries), num_keys).to(tl.int32)
    first_position = text_end - num_queries  # of query 0
    position = first_position + t
    tile_first = first_position + tile * BLOCK_M // GROUP
    tile_last = first_position + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)

    dim = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + batch * stride_qb + head[:, None] * stride_qh + t.to(tl.int64)[:, None] * stride_qt
    tile_ok = row_ok[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(q_rows + dim.to(tl.int64)[None, :] * stride_qd, mask=tile_ok, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    row_sum = tl.zeros([BLOCK_M], dtype=ACC)
    block = tl.arange(0, BLOCK_N)

    # Audio.
    audio_row = batch
    if index_ptr is not None:
        audio_row = tl.minimum(tl.maximum(tl.load(index_ptr + batch), 0), num_audio_rows - 1).to(tl.int64)
    audio_length = num_audio
    if lengths_ptr is not None:
        audio_length = tl.minimum(tl.maximum(tl.load(lengths_ptr + audio_row), 0), num_audio).to(tl.int32)
    ak_base = ak_ptr + audio_row * stride_akb + kv_head * stride_akh
    av_base = av_ptr + audio_row * stride_avb + kv_head * stride_avh

    full_end = 0
    if visible_ptr is None:
        full_end = audio_length // BLOCK_N * BLOCK_N
        for first in range(0, full_end, BLOCK_N):
            acc, row_max, row_sum = attend_block(
                acc, row_max, row_sum, query, ak_base, stride_akt, stride_akd, av_base, stride_avt, stride_avd,
                first + block, None, None, SCALE, SOFTCAP, HEAD_DIM, BLOCK_D, ACC,
            )  # fmt: skip
    for first in range(full_end, audio_length, BLOCK_N):
        token = first + block
        # A token that no query of this text row sees may hold anything: it is not loaded.
        loaded = token < audio_length
        visible = loaded[None, :]
        if visible_ptr is not None:
            visible_from = tl.load(
                visible_ptr + batch * stride_visible_b + token.to(tl.int64) * stride_visible_n,
                mask=loaded,
                other=0,
            )
            loaded = loaded & (visible_from < text_end)
            visible = loaded[None, :] & (visible_from[None, :] <= position[:, None])
        acc, row_max, row_sum = attend_block(
            acc, row_max, row_sum, query, ak_base, stride_akt, stride_akd, av_base, stride_avt, stride_avd,
            token, loaded, visible, SCALE, SOFTCAP, HEAD_DIM, BLOCK_D, ACC,
        )  # fmt: skip

    # Text, from the first key that any row of the tile sees to the last.
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    text_first = 0
    if start_ptr is not None:
        text_first = tl.minimum(tl.maximum(tl.load(start_ptr + batch), 0), text_end).to(tl.int32)
    if window is not None:
        text_first = tl.maximum(text_first, tile_first - window + 1)

    full_end = text_first
    if window is None:  # then every row of the tile sees the keys up to its first row's position
        full_end += tl.maximum(tile_first + 1 - text_first, 0) // BLOCK_N * BLOCK_N
        for first in range(text_first, full_end, BLOCK_N):
            acc, row_max, row_sum = attend_block(
                acc, row_max, row_sum, query, k_base, stride_kt, stride_kd, v_base, stride_vt, stride_vd,
                first + block, None, None, SCALE, SOFTCAP, HEAD_DIM, BLOCK_D, ACC,
            )  # fmt: skip
    for first in range(full_end, tile_last + 1, BLOCK_N):
        index = first + block
        loaded = index <= tile_last
        visible = loaded[None, :] & (index[None, :] <= position[:, None])
        if window is not None:
            visible = visible & (index[None, :] > position[:, None] - window)
        acc, row_max, row_sum = attend_block(
            acc, row_max, row_sum, query, k_base, stride_kt, stride_kd, v_base, stride_vt, stride_vd,
            index, loaded, visible, SCALE, SOFTCAP, HEAD_DIM, BLOCK_D, ACC,
        )  # fmt: skip

    blind = row_sum == 0.0
    total = tl.where(blind, 1.0, row_sum)
    out = acc / total[:, None]
    lse = tl.where(blind, float("-inf"), row_max * LN_2 + tl.log(total))
    out_rows = out_ptr + batch * stride_ob + head[:, None] * stride_oh + t.to(tl.int64)[:, None] * stride_ot
    tl.store(out_rows + dim.to(tl.int64)[None, :] * stride_od, out.to(out_ptr.dtype.element_ty), mask=tile_ok)
    lse_row = (batch * num_kv_heads * GROUP + head) * num_queries + t
    tl.store(lse_ptr + lse_row, lse, mask=row_ok)


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
    out: Tensor,
    lse: Tensor,
) -> None:
    """Launch on validated inputs, into ``out`` (B, Hq, T, D) and ``lse`` (B, Hq, T)."""
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    if out.numel() == 0:
        return
    group = num_heads // num_kv_heads
    capability = None if INTERPRETED else tiles.capability(query.device)
    tile = tiles.forward_tile(capability, query.element_size(), head_dim, group * num_queries)
    grid = (batch * num_kv_heads * triton.cdiv(group * num_queries, tile.block_m),)
    visible_strides = (0, 0) if audio_visible_from is None else audio_visible_from.stride()
    on_device = contextlib.nullcontext() if INTERPRETED else torch.cuda.device(query.device)
    with on_device:
        lal_forward_kernel[grid](
            query,
            key,
            value,
            audio_key,
            audio_value,
            out,
            lse,
            *(_contiguous(x) for x in (audio_lengths, audio_index)),
            audio_visible_from,
            *(_contiguous(x) for x in (text_start, text_end)),
            window,
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *audio_key.stride(),
            *audio_value.stride(),
            *out.stride(),
            *visible_strides,
            num_queries,
            num_keys,
            audio_key.shape[2],
            audio_key.shape[0],
            num_kv_heads,
            SCALE=scale,
            SOFTCAP=softcap,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_D=tiles.padded_head_dim(head_dim),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            ACC=tl.float64 if query.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
