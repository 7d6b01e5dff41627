"""LAL attention for a few queries per row: the keys are split over many programs, in one launch.

Decoding reads every key once and computes little, so what counts is that all of the GPU reads, and that no warp waits.
The keys of a row are divided evenly over programs, whose parts :mod:`palkernels.kernels.parts` merges. With few rows
each block of keys is divided once more, into sub-blocks: every warp keeps a running output of its own keys, so that
the warps exchange nothing from block to block. Audio is loaded once for all text rows that read the clip: their queries
lie side by side in one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palkernels.arguments import Call
from palkernels.kernels import scratch, tiles
from palkernels.kernels.division import Division
from palkernels.kernels.keys import (
    audio_row,
    audio_scale,
    next_reader,
    scale_values,
    text_row,
    visit_text,
    visit_whole_blocks,
)
from palkernels.kernels.launch import Launch, attention_launch
from palkernels.kernels.operands import UNSPECIALISED, Matrix, Scales, Sizes
from palkernels.kernels.parts import Parts, Shares, arrive, seen_text, share, store_part
from palkernels.kernels.primitives import (
    accumulator_type,
    block_tokens,
    load_rows,
    padded,
    prefetch_rows,
    split_program,
)
from palkernels.kernels.softmax import attend

MAX_QUERIES = 8


@triton.jit
def load_queries(
    query, readers, kv_head, row, row_ok, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SUB_BLOCKS: tl.constexpr
):
    """Packed rows (M,) of text rows ``readers`` (M,), as (M, BLOCK_D), or once for each of several sub-blocks."""
    dim = tl.arange(0, padded(HEAD_DIM))[None, :]
    head, token = kv_head * GROUP + row % GROUP, row // GROUP
    ok = row_ok[:, None] & (dim < HEAD_DIM)
    if query.wide is not None:
        head, token, dim = head.to(tl.int64), token.to(tl.int64), dim.to(tl.int64)
    pointers = query.ptr + (readers.to(tl.int64) * query.batch)[:, None]
    pointers += (head * query.head + token * query.token)[:, None] + dim * query.dim
    if SUB_BLOCKS > 1:
        pointers = tl.broadcast_to(pointers[None, :, :], (SUB_BLOCKS, pointers.shape[0], pointers.shape[1]))
        ok = tl.broadcast_to(ok[None, :, :], pointers.shape)
    return tl.load(pointers, mask=ok, other=0.0)


@triton.jit
def empty_state(queries):
    acc_type: tl.constexpr = accumulator_type(queries)
    acc = tl.zeros(queries.shape, dtype=acc_type)
    row_max = tl.full(queries.shape[:-1], float("-inf"), dtype=acc_type)
    return acc, row_max, tl.zeros(queries.shape[:-1], dtype=acc_type)


@triton.jit
def whole_state(state, SUB_BLOCKS: tl.constexpr):
    """The state (M, BLOCK_D), (M,), (M,) of all keys, from that of each sub-block."""
    if SUB_BLOCKS == 1:
        return state
    else:
        acc, row_max, row_sum = state
        total_max = tl.max(row_max, axis=0)
        shift = tl.where(total_max == float("-inf"), 0.0, total_max)
        weights = tl.exp2(row_max - shift[None, :])
        ROWS: tl.constexpr = acc.shape[1]
        COLUMNS: tl.constexpr = acc.shape[2]
        flat = tl.trans(tl.reshape(acc * weights[:, :, None], (SUB_BLOCKS, ROWS * COLUMNS)))
        acc = pairwise_sum(tl.reshape(flat, (ROWS, COLUMNS, SUB_BLOCKS)))
        return acc, total_max, tl.sum(row_sum * weights, axis=0)


@triton.jit
def pairwise_sum(values):
    """The sums (M, D) of values (M, D, 2 ** n), of one half and the other: a sum along an axis that lies across warps
    would cost them a barrier for every few values."""
    if values.shape[2] == 2:
        first, second = tl.split(values)
        return first + second
    else:
        first, second = tl.split(tl.reshape(values, (values.shape[0], values.shape[1], values.shape[2] // 2, 2)))
        return pairwise_sum(first + second)


@triton.jit
def prefetch_share(key, value, row, kv_head, first, end, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for the first keys and values of a share, if it has any. Their loads come after the queries have; what these
    wait for is on its way meanwhile."""
    if first < end:
        prefetch_rows(key, row, kv_head, first, end, HEAD_DIM, BLOCK_N)
        prefetch_rows(value, row, kv_head, first, end, HEAD_DIM, BLOCK_N)


@triton.jit
def attend_audio(
    queries, key_scale, readers, row, row_ok, first, end, audio, kv_head, key, value, visibility, sizes,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Audio tokens from ``first`` on, below ``end``, as the packed rows of several text rows see them."""
    state = empty_state(queries)
    full_end = first
    if visibility.visible_from is None:
        full_end += tl.maximum(end - first, 0) // BLOCK_N * BLOCK_N
        state = visit_whole_blocks(
            state, attend, (queries, key_scale), first, full_end, audio, kv_head, key, value,
            SCALE, SOFTCAP, HEAD_DIM, BLOCK_N, SUB_BLOCKS,
        )  # fmt: skip
    for start in range(full_end, end, BLOCK_N):
        token = block_tokens(start, BLOCK_N, SUB_BLOCKS)
        loaded = token < end
        visible = tl.expand_dims(loaded, -2)
        if visibility.visible_from is not None:
            position = text_row(visibility, readers, sizes).end - sizes.num_queries + row // GROUP
            offset = readers.to(tl.int64)[:, None] * visibility.visible_from_batch
            offset = offset + tl.expand_dims(token.to(tl.int64), -2) * visibility.visible_from_token
            visible = visible & row_ok[:, None]
            visible_from = tl.load(visibility.visible_from + offset, mask=visible, other=0)
            visible = visible & (visible_from <= position[:, None])
            loaded = tl.max(visible.to(tl.int32), axis=-2) > 0
        keys = load_rows(key, audio, kv_head, token, 0, loaded, HEAD_DIM)
        values = load_rows(value, audio, kv_head, token, 0, loaded, HEAD_DIM)
        state = attend(state, (queries, key_scale), keys, values, visible, SCALE, SOFTCAP)
    return state


@triton.jit
def decode_audio(
    query, key, value, scales, out, lse_ptr, parts, visibility, sizes, program, shares,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One share of an audio row's tokens, for every text row that reads them."""
    split, kv_head, clip = split_program(program, shares.audio, sizes.num_kv_heads)
    audio = audio_row(visibility, clip, sizes)
    first, end = share(0, audio.length, split, shares.audio, BLOCK_N)
    prefetch_share(key, value, audio, kv_head, first, end, HEAD_DIM, BLOCK_N)
    acc_type: tl.constexpr = accumulator_type(query.ptr)
    key_scale, value_scale = None, None
    if scales.key is not None:
        key_scale = audio_scale(scales.key, audio, kv_head, sizes, acc_type)
        value_scale = audio_scale(scales.value, audio, kv_head, sizes, acc_type)
    num_rows = sizes.num_queries * GROUP
    lane = tl.arange(0, BLOCK_M)
    batch = next_reader(visibility, clip, 0, sizes)
    while batch < sizes.num_batches:
        # As many readers as fit into one tile.
        readers = tl.zeros([BLOCK_M], dtype=tl.int32)
        taken = 0
        while (batch < sizes.num_batches) & ((taken + 1) * num_rows <= BLOCK_M):
            readers = tl.where(lane // num_rows == taken, batch, readers)
            taken += 1
            batch = next_reader(visibility, clip, batch + 1, sizes)
        row_ok = lane < taken * num_rows
        if first < end:
            # The rows and ``first`` again, but in the compiler's eyes others each time: it would keep the addresses of
            # all loads in registers otherwise, and spill.
            row = tl.minimum(lane, BLOCK_M + sizes.num_batches + taken) % num_rows
            queries = load_queries(query, readers, kv_head, row, row_ok, GROUP, HEAD_DIM, SUB_BLOCKS)
            begin = tl.minimum(first, sizes.num_audio + taken)
            state = attend_audio(
                queries, key_scale, readers, row, row_ok, begin, end, audio, kv_head, key, value, visibility, sizes,
                SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, SUB_BLOCKS,
            )  # fmt: skip
            state = scale_values(whole_state(state, SUB_BLOCKS), value_scale)
            store_part(state, parts, readers, kv_head, split, shares, row, row_ok, sizes, GROUP, HEAD_DIM)
        for reader in range(taken):
            reader_batch = tl.sum(tl.where(lane == reader * num_rows, readers, 0), axis=0)
            arrive(parts, out, lse_ptr, visibility, reader_batch, kv_head, shares, sizes, GROUP, HEAD_DIM, BLOCK_N)


@triton.jit
def decode_text(
    query, key, value, out, lse_ptr, parts, visibility, sizes, program, shares,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One share of a text row's keys."""
    split, kv_head, batch = split_program(program, shares.text, sizes.num_kv_heads)
    text = text_row(visibility, batch, sizes)
    first, end = seen_text(text, sizes)
    first, end = share(first, end, split, shares.text, BLOCK_N)
    if first < end:
        prefetch_share(key, value, text, kv_head, first, end, HEAD_DIM, BLOCK_N)
        row = tl.arange(0, BLOCK_M)
        row_ok = row < sizes.num_queries * GROUP
        readers = tl.zeros([BLOCK_M], dtype=tl.int32) + batch
        queries = load_queries(query, readers, kv_head, row, row_ok, GROUP, HEAD_DIM, SUB_BLOCKS)
        first_position = text.end - sizes.num_queries
        state = visit_text(
            empty_state(queries), attend, (queries, None), first_position + row // GROUP, first_position, first, end,
            text, kv_head, key, value, sizes.window, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N, SUB_BLOCKS,
        )  # fmt: skip
        state = whole_state(state, SUB_BLOCKS)
        # The audio's shares come first.
        split += shares.audio
        store_part(state, parts, readers, kv_head, split, shares, row, row_ok, sizes, GROUP, HEAD_DIM)
    arrive(parts, out, lse_ptr, visibility, batch, kv_head, shares, sizes, GROUP, HEAD_DIM, BLOCK_N)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "audio_shares", "text_shares"])
def decode_kernel(
    query,  # Matrix (B, Hkv * GROUP, T, D)
    key,  # Matrix (B, Hkv, S, D)
    value,
    audio_key,  # Matrix (A, Hkv, N, D)
    audio_value,
    scales,  # of audio_key and audio_value
    out,  # Matrix (B, Hkv * GROUP, T, D)
    lse_ptr,  # (B, Hkv * GROUP, T), contiguous
    parts,
    audio_shares,  # programs per (audio row, K/V head)
    text_shares,  # programs per (text row, K/V head)
    visibility,
    num_queries,
    num_keys,
    num_audio,
    num_audio_rows,
    num_batches,
    num_kv_heads,
    text_tokens,
    audio_tokens,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB_BLOCKS: tl.constexpr,
):
    sizes = Sizes(
        num_queries, num_keys, num_audio, num_audio_rows, num_batches, num_kv_heads, text_tokens, audio_tokens, window
    )
    shares = Shares(audio_shares, text_shares)
    program = tl.program_id(0)
    audio_programs = num_audio_rows * num_kv_heads * audio_shares
    if program < audio_programs:
        decode_audio(
            query, audio_key, audio_value, scales, out, lse_ptr, parts, visibility, sizes, program, shares,
            SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, SUB_BLOCKS,
        )  # fmt: skip
    else:
        decode_text(
            query, key, value, out, lse_ptr, parts, visibility, sizes, program - audio_programs, shares,
            SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, SUB_BLOCKS,
        )  # fmt: skip


def takes(call: Call, capability: int | None) -> bool:
    """Whether the decoding kernel takes a call: a text row's queries, of all heads that share keys, fit into a tile."""
    num_queries = call.query.shape[2]
    return (
        call.cu_seqlens is None
        and 0 < num_queries <= MAX_QUERIES
        and num_queries * call.group <= _tile(call, capability, None).block_m
    )


def decode_launch(call: Call, out: Tensor, lse: Tensor, capability: int | None, *, uses_kept: bool = False) -> Launch:
    """The launch for a call that :func:`takes` takes; it fills ``out`` and ``lse`` as the forward launch does.

    ``uses_kept``: what its programs leave for each other lies in memory of :mod:`palkernels.kernels.scratch`, so that
    decoding allocates its outputs and nothing else.
    """
    division = division_of(call, capability)
    shares = division.shares()
    tile = _tile(call, capability, _num_rows(call))
    return attention_launch(
        decode_kernel,
        division.num_programs(shares),
        tile,
        call,
        *(Matrix.of(tensor) for tensor in call.floats().values()),
        Scales.of(call.audio_key_scale, call.audio_value_scale),
        Matrix.of(out),
        lse,
        Parts(*_parts(call.query, lse, division, shares, uses_kept)),
        *shares,
        SUB_BLOCKS=tile.sub_blocks,
    )


def division_of(call: Call, capability: int | None) -> Division:
    return Division.of(call, _tile(call, capability, _num_rows(call)).block_n, capability)


def _num_rows(call: Call) -> int:
    """Packed rows that a tile is to hold: one text row's, but where text rows may share a clip."""
    return call.num_queries * call.group * (1 if call.audio_index is None else call.num_batches)


def _tile(call: Call, capability: int | None, num_rows: int | None) -> tiles.Tile:
    return tiles.choose("decode", capability, call.query.dtype, call.head_dim, call.is_intricate, num_rows)


def _parts(
    query: Tensor, lse: Tensor, division: Division, shares: tuple[int, int], uses_kept: bool
) -> tuple[Tensor, ...]:
    """The fields of :class:`Parts`."""
    *begins, end = division.places(shares)
    if uses_kept:
        stream = torch.cuda.current_stream(query.device).cuda_stream
        floats, counters = scratch.kept(query.device, stream, end, division.num_counters())
    else:
        floats, counters = lse.new_empty(end), _zeros(query, division.num_counters())
    return (*(floats[begin:] for begin in begins), counters)


def _zeros(query: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=query.device)
