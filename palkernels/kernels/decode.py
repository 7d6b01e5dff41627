"""LAL attention for a few queries per row: the keys are split over many programs, in one launch.

Decoding reads every key once and computes little, so what counts is that all of the GPU reads. The keys of a row that
are valid, which only the device knows, are divided evenly over a fixed number of programs. Each leaves its output,
maximum and sum in memory, and the last to arrive at a (text row, K/V head) merges them, always in the order of the
keys. Audio is loaded once for all text rows that read the clip: their queries lie side by side in one tile.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from palkernels.arguments import Call
from palkernels.kernels import scratch, tiles
from palkernels.kernels.division import Division
from palkernels.kernels.keys import audio_row, next_reader, text_row, visit_text, visit_whole_blocks
from palkernels.kernels.launch import Launch, attention_launch
from palkernels.kernels.operands import UNSPECIALISED, Matrix, Sizes
from palkernels.kernels.primitives import LN_2, accumulator_type, load_rows, padded, split_program
from palkernels.kernels.softmax import attend

MAX_QUERIES = 8
MERGED_ROWS = tl.constexpr(16)  # at once


class Parts(NamedTuple):
    """What the programs leave in memory for the one that merges it."""

    acc: Any  # (B, Hkv, splits, T * GROUP, D), not yet divided by the sums
    row_max: Any  # (B, Hkv, splits, T * GROUP), in base 2
    row_sum: Any
    arrived: Any  # (B, Hkv): programs that are through; zeros, and zeros again when the launch is over


@triton.jit
def share(first, end, split, num_splits, BLOCK_N: tl.constexpr):
    """Where one of ``num_splits`` even shares of the keys from ``first`` on, below ``end``, begins and ends: whole
    blocks each, but for the last key's."""
    per_split = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), BLOCK_N), num_splits) * BLOCK_N
    begin = first + split * per_split
    return begin, tl.minimum(begin + per_split, end)


@triton.jit
def load_queries(query, readers, kv_head, row, row_ok, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Packed rows (M,) of text rows ``readers`` (M,), as (M, BLOCK_D)."""
    dim = tl.arange(0, padded(HEAD_DIM))[None, :]
    head = kv_head * GROUP + row % GROUP
    offset = readers.to(tl.int64) * query.batch + head.to(tl.int64) * query.head
    offset += (row // GROUP).to(tl.int64) * query.token
    pointers = query.ptr + offset[:, None] + dim.to(tl.int64) * query.dim
    return tl.load(pointers, mask=row_ok[:, None] & (dim < HEAD_DIM), other=0.0)


@triton.jit
def empty_state(queries, BLOCK_M: tl.constexpr):
    acc_type: tl.constexpr = accumulator_type(queries)
    acc = tl.zeros(queries.shape, dtype=acc_type)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=acc_type)
    return acc, row_max, tl.zeros([BLOCK_M], dtype=acc_type)


@triton.jit
def store_part(
    state, parts, readers, kv_head, split, num_splits, row, row_ok, sizes, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    acc, row_max, row_sum = state
    dim = tl.arange(0, padded(HEAD_DIM))[None, :]
    place = ((readers * sizes.num_kv_heads + kv_head).to(tl.int64) * num_splits + split) * (sizes.num_queries * GROUP)
    place += row
    tl.store(parts.row_max + place, row_max, mask=row_ok)
    tl.store(parts.row_sum + place, row_sum, mask=row_ok)
    tl.store(parts.acc + place[:, None] * HEAD_DIM + dim, acc, mask=row_ok[:, None] & (dim < HEAD_DIM))


@triton.jit
def arrive(parts, out, lse_ptr, batch, kv_head, num_splits, sizes, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Count this program in; the last one of a (text row, K/V head) merges what all have stored."""
    place = batch * sizes.num_kv_heads + kv_head
    tl.debug_barrier()  # every thread's stores come before the count
    if tl.atomic_add(parts.arrived + place, 1, sem="acq_rel") == num_splits - 1:
        for first in range(0, sizes.num_queries * GROUP, MERGED_ROWS):
            merge(parts, out, lse_ptr, batch, kv_head, first, num_splits, sizes, GROUP, HEAD_DIM)
        tl.store(parts.arrived + place, 0)  # for the next launch


@triton.jit
def merge(parts, out, lse_ptr, batch, kv_head, first, num_splits, sizes, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Output and LSE of MERGED_ROWS packed rows from ``first`` on, from all their keys."""
    num_rows = sizes.num_queries * GROUP
    row = first + tl.arange(0, MERGED_ROWS)
    row_ok = row < num_rows
    dim = tl.arange(0, padded(HEAD_DIM))[None, :]
    value_ok = row_ok[:, None] & (dim < HEAD_DIM)
    place = tl.cast(batch * sizes.num_kv_heads + kv_head, tl.int64)
    base = place * num_splits * num_rows
    # Not from the L1 cache, which does not know of other programs' stores.
    maxima = parts.row_max + base + row
    total_max = tl.load(maxima, mask=row_ok, other=float("-inf"), cache_modifier=".cg")
    for split in range(1, num_splits):
        row_max = tl.load(maxima + split * num_rows, mask=row_ok, other=float("-inf"), cache_modifier=".cg")
        total_max = tl.maximum(total_max, row_max)
    shift = tl.where(total_max == float("-inf"), 0.0, total_max)
    acc = tl.zeros([MERGED_ROWS, padded(HEAD_DIM)], dtype=total_max.dtype)
    total = tl.zeros([MERGED_ROWS], dtype=total_max.dtype)
    for split in range(num_splits):
        row_max = tl.load(maxima + split * num_rows, mask=row_ok, other=float("-inf"), cache_modifier=".cg")
        sums = parts.row_sum + base + split * num_rows + row
        row_sum = tl.load(sums, mask=row_ok, other=0.0, cache_modifier=".cg")
        accs = parts.acc + (base + split * num_rows) * HEAD_DIM + row[:, None] * HEAD_DIM + dim
        weight = tl.exp2(row_max - shift)
        total += weight * row_sum
        acc += weight[:, None] * tl.load(accs, mask=value_ok, other=0.0, cache_modifier=".cg")
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    t, member = row // GROUP, row % GROUP
    lse = tl.where(blind, float("-inf"), total_max * LN_2 + tl.log(total))
    tl.store(lse_ptr + place * num_rows + member * sizes.num_queries + t, lse, mask=row_ok)
    pointers = out.ptr + tl.cast(batch, tl.int64) * out.batch + tl.cast(kv_head, tl.int64) * GROUP * out.head
    pointers += (member.to(tl.int64) * out.head + t.to(tl.int64) * out.token)[:, None] + dim * out.dim
    tl.store(pointers, (acc / total[:, None]).to(out.ptr.dtype.element_ty), mask=value_ok)


@triton.jit
def attend_audio(
    queries, readers, row, row_ok, first, end, audio, kv_head, key, value, visibility, sizes,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Audio tokens from ``first`` on, below ``end``, as the packed rows of several text rows see them."""
    state = empty_state(queries, BLOCK_M)
    full_end = first
    if visibility.visible_from is None:
        full_end += tl.maximum(end - first, 0) // BLOCK_N * BLOCK_N
        state = visit_whole_blocks(
            state, attend, (queries,), first, full_end, audio, kv_head, key, value, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N
        )
    for start in range(full_end, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        loaded = token < end
        visible = loaded[None, :]
        if visibility.visible_from is not None:
            position = text_row(visibility, readers, sizes).end - sizes.num_queries + row // GROUP
            offset = readers.to(tl.int64)[:, None] * visibility.visible_from_batch
            offset += token.to(tl.int64)[None, :] * visibility.visible_from_token
            visible = row_ok[:, None] & loaded[None, :]
            visible_from = tl.load(visibility.visible_from + offset, mask=visible, other=0)
            visible = visible & (visible_from <= position[:, None])
            loaded = tl.max(visible.to(tl.int32), axis=0) > 0
        keys = load_rows(key, audio, kv_head, token, 0, loaded, HEAD_DIM)
        values = load_rows(value, audio, kv_head, token, 0, loaded, HEAD_DIM)
        state = attend(state, (queries,), keys, values, visible, SCALE, SOFTCAP)
    return state


@triton.jit
def decode_audio(
    query, key, value, out, lse_ptr, parts, visibility, sizes, program, num_shares, num_splits,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One share of an audio row's tokens, for every text row that reads them."""
    split, kv_head, clip = split_program(program, num_shares, sizes.num_kv_heads)
    audio = audio_row(visibility, clip, sizes)
    first, end = share(0, audio.length, split, num_shares, BLOCK_N)
    num_rows = sizes.num_queries * GROUP
    lane = tl.arange(0, BLOCK_M)
    row = lane % num_rows
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
        queries = load_queries(query, readers, kv_head, row, row_ok, GROUP, HEAD_DIM)
        # ``first`` again, but in the compiler's eyes another one each time: it would keep the addresses of all loads in
        # registers otherwise, and spill.
        begin = tl.minimum(first, sizes.num_audio + taken)
        state = attend_audio(
            queries, readers, row, row_ok, begin, end, audio, kv_head, key, value, visibility, sizes,
            SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_part(state, parts, readers, kv_head, split, num_splits, row, row_ok, sizes, GROUP, HEAD_DIM)
        for reader in range(taken):
            reader_batch = tl.sum(tl.where(lane == reader * num_rows, readers, 0), axis=0)
            arrive(parts, out, lse_ptr, reader_batch, kv_head, num_splits, sizes, GROUP, HEAD_DIM)


@triton.jit
def decode_text(
    query, key, value, out, lse_ptr, parts, visibility, sizes, program, num_shares, num_splits,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One share of a text row's keys."""
    split, kv_head, batch = split_program(program, num_shares, sizes.num_kv_heads)
    text = text_row(visibility, batch, sizes)
    first_position = text.end - sizes.num_queries
    first = text.start
    if sizes.window is not None:
        first = tl.maximum(first, first_position - sizes.window + 1)
    first, end = share(first, text.end, split, num_shares, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    row_ok = row < sizes.num_queries * GROUP
    readers = tl.zeros([BLOCK_M], dtype=tl.int32) + batch
    queries = load_queries(query, readers, kv_head, row, row_ok, GROUP, HEAD_DIM)
    state = visit_text(
        empty_state(queries, BLOCK_M), attend, (queries,), first_position + row // GROUP, first_position, first, end,
        text, kv_head, key, value, sizes.window, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    # The audio's shares come first.
    split += num_splits - num_shares
    store_part(state, parts, readers, kv_head, split, num_splits, row, row_ok, sizes, GROUP, HEAD_DIM)
    arrive(parts, out, lse_ptr, batch, kv_head, num_splits, sizes, GROUP, HEAD_DIM)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "audio_shares", "text_shares"])
def decode_kernel(
    query,  # Matrix (B, Hkv * GROUP, T, D)
    key,  # Matrix (B, Hkv, S, D)
    value,
    audio_key,  # Matrix (A, Hkv, N, D)
    audio_value,
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
):
    sizes = Sizes(
        num_queries, num_keys, num_audio, num_audio_rows, num_batches, num_kv_heads, text_tokens, audio_tokens, window
    )
    num_splits = audio_shares + text_shares
    program = tl.program_id(0)
    audio_programs = num_audio_rows * num_kv_heads * audio_shares
    if program < audio_programs:
        decode_audio(
            query, audio_key, audio_value, out, lse_ptr, parts, visibility, sizes, program, audio_shares, num_splits,
            SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        decode_text(
            query, key, value, out, lse_ptr, parts, visibility, sizes, program - audio_programs, text_shares,
            num_splits, SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def takes(call: Call, capability: int | None) -> bool:
    """Whether the decoding kernel takes a call: a text row's queries, of all heads that share keys, fit into a tile."""
    num_queries = call.query.shape[2]
    return (
        call.cu_seqlens is None
        and 0 < num_queries <= MAX_QUERIES
        and num_queries * call.group <= _tile(call, capability).block_m
    )


def decode_launch(call: Call, out: Tensor, lse: Tensor, capability: int | None, *, uses_kept: bool = False) -> Launch:
    """The launch for a call that :func:`takes` takes; it fills ``out`` and ``lse`` as the forward launch does.

    ``uses_kept``: what its programs leave for each other lies in memory of :mod:`palkernels.kernels.scratch`, so that
    decoding allocates its outputs and nothing else.
    """
    division = division_of(call, capability)
    shares = division.shares()
    readers = 1 if call.audio_index is None else call.num_batches
    # One text row to a tile, but where text rows may share a clip.
    tile = tiles.with_rows(_tile(call, capability), division.num_rows * readers)
    return attention_launch(
        decode_kernel,
        division.num_programs(shares),
        tile,
        call,
        *(Matrix.of(tensor) for tensor in (*call.floats().values(), out)),
        lse,
        Parts(*_parts(call.query, lse, division, shares, uses_kept)),
        *shares,
    )


def division_of(call: Call, capability: int | None) -> Division:
    return Division.of(call, _tile(call, capability).block_n, capability)


def _tile(call: Call, capability: int | None) -> tiles.Tile:
    return tiles.choose("decode", capability, call.query.dtype, call.head_dim, call.is_intricate)


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
