"""What the programs of a decoding launch leave in memory for each other, and how the last of them merges it.

The keys of a row that are valid, which only the device knows, are divided evenly among a fixed number of programs. Each
that has keys leaves a part: its output, maximum and sum. All count themselves in, those without keys too, so that the
count does not depend on what the device holds; the last to arrive at a (text row, K/V head) merges the parts that are
there, always in the order of the keys.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from palkernels.kernels.keys import audio_read_by, text_row
from palkernels.kernels.primitives import LN_2, padded

MERGED_ROWS = tl.constexpr(8)  # at once


@triton.constexpr_function
def parts_at_once(head_dim):
    """How many parts are merged at once: their loads do not wait for each other, but must fit the registers."""
    return 4 if head_dim <= 64 else 2


class Parts(NamedTuple):
    """What the programs leave in memory for the one that merges it."""

    acc: Any  # (B, Hkv, splits, T * GROUP, D), not yet divided by the sums
    row_max: Any  # (B, Hkv, splits, T * GROUP), in base 2
    row_sum: Any
    arrived: Any  # (B, Hkv): programs that are through; zeros, and zeros again when the launch is over


class Shares(NamedTuple):
    """Built inside the kernel: in how many shares the keys of a row are divided. Splits are the audio's, then the
    text's."""

    audio: Any  # of an audio row and K/V head, a program each
    text: Any  # of a text row and K/V head


@triton.jit
def share_size(first, end, num_shares, BLOCK_N: tl.constexpr):
    """Keys in each of ``num_shares`` even shares of those from ``first`` on, below ``end``: whole blocks."""
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)
    return tl.cdiv(blocks, num_shares) * BLOCK_N


@triton.jit
def share(first, end, split, num_shares, BLOCK_N: tl.constexpr):
    """Where one of these shares begins and ends; the last key's may end within a block, and those after it are
    empty."""
    size = share_size(first, end, num_shares, BLOCK_N)
    begin = first + split * size
    return begin, tl.minimum(begin + size, end)


@triton.jit
def filled_shares(first, end, num_shares, BLOCK_N: tl.constexpr):
    """How many of these shares have keys: the first ones. There may be no share at all."""
    size = share_size(first, end, tl.maximum(num_shares, 1), BLOCK_N)
    return tl.cdiv(tl.maximum(end - first, 0), tl.maximum(size, 1))


@triton.jit
def seen_text(text, sizes):
    """First, and one past the last, of the text keys that any query of a row sees."""
    first = text.start
    if sizes.window is not None:
        first = tl.maximum(first, text.end - sizes.num_queries - sizes.window + 1)
    return first, text.end


@triton.jit
def store_part(
    state, parts, readers, kv_head, split, shares, row, row_ok, sizes, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    acc, row_max, row_sum = state
    dim = tl.arange(0, padded(HEAD_DIM))[None, :]
    num_splits = shares.audio + shares.text
    place = ((readers * sizes.num_kv_heads + kv_head).to(tl.int64) * num_splits + split) * (sizes.num_queries * GROUP)
    place += row
    tl.store(parts.row_max + place, row_max, mask=row_ok)
    tl.store(parts.row_sum + place, row_sum, mask=row_ok)
    tl.store(parts.acc + place[:, None] * HEAD_DIM + dim, acc, mask=row_ok[:, None] & (dim < HEAD_DIM))


@triton.jit
def arrive(
    parts, out, lse_ptr, visibility, batch, kv_head, shares, sizes,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Count this program in; the last one of a (text row, K/V head) merges what all have stored."""
    place = batch * sizes.num_kv_heads + kv_head
    first, end = seen_text(text_row(visibility, batch, sizes), sizes)
    text_parts = filled_shares(first, end, shares.text, BLOCK_N)
    audio_parts = filled_shares(0, audio_read_by(visibility, batch, sizes).length, shares.audio, BLOCK_N)
    tl.debug_barrier()  # every thread's stores come before the count
    if tl.atomic_add(parts.arrived + place, 1, sem="acq_rel") == shares.audio + shares.text - 1:
        for first_row in range(0, sizes.num_queries * GROUP, MERGED_ROWS):
            merge(
                parts, out, lse_ptr, batch, kv_head, first_row, audio_parts, text_parts, shares, sizes, GROUP, HEAD_DIM
            )
        tl.store(parts.arrived + place, 0)  # for the next launch


@triton.jit
def merge(
    parts, out, lse_ptr, batch, kv_head, first_row, audio_parts, text_parts, shares, sizes,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Output and LSE of MERGED_ROWS packed rows from ``first_row`` on, from the parts that there are."""
    MERGED_PARTS: tl.constexpr = parts_at_once(HEAD_DIM)
    num_rows = sizes.num_queries * GROUP
    row = first_row + tl.arange(0, MERGED_ROWS)
    row_ok = row < num_rows
    dim = tl.arange(0, padded(HEAD_DIM))[None, :]
    value_ok = row_ok[:, None] & (dim < HEAD_DIM)
    place = tl.cast(batch * sizes.num_kv_heads + kv_head, tl.int64)
    base = place * ((shares.audio + shares.text) * num_rows)
    row_max, row_sum, accs = parts.row_max + base, parts.row_sum + base, parts.acc + base * HEAD_DIM
    total_max = tl.full([MERGED_ROWS], float("-inf"), dtype=parts.row_max.dtype.element_ty)
    total = tl.zeros([MERGED_ROWS], dtype=total_max.dtype)
    acc = tl.zeros([MERGED_ROWS, padded(HEAD_DIM)], dtype=total_max.dtype)
    # The rows of several parts, one part after the other.
    each = tl.arange(0, MERGED_PARTS * MERGED_ROWS)
    part_row = first_row + each % MERGED_ROWS
    for first_part in range(0, audio_parts + text_parts, MERGED_PARTS):
        part = first_part + each // MERGED_ROWS
        split = tl.where(part < audio_parts, part, part - audio_parts + shares.audio)
        rows = split * num_rows + part_row
        ok = (part < audio_parts + text_parts) & (part_row < num_rows)
        # Not from the L1 cache, which does not know of other programs' stores.
        maxima = tl.load(row_max + rows, mask=ok, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(row_sum + rows, mask=ok, other=0.0, cache_modifier=".cg")
        places = rows[:, None] * HEAD_DIM + dim
        values = tl.load(accs + places, mask=ok[:, None] & (dim < HEAD_DIM), other=0.0, cache_modifier=".cg")
        maxima = tl.reshape(maxima, (MERGED_PARTS, MERGED_ROWS))
        new_max = tl.maximum(total_max, tl.max(maxima, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(total_max - shift)
        weights = tl.exp2(maxima - shift[None, :])
        total = total * decay + tl.sum(weights * tl.reshape(sums, weights.shape), axis=0)
        values = tl.reshape(values, (MERGED_PARTS, MERGED_ROWS, padded(HEAD_DIM)))
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * values, axis=0)
        total_max = new_max
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    t, member = row // GROUP, row % GROUP
    lse = tl.where(blind, float("-inf"), total_max * LN_2 + tl.log(total))
    tl.store(lse_ptr + place * num_rows + member * sizes.num_queries + t, lse, mask=row_ok)
    pointers = out.ptr + tl.cast(batch, tl.int64) * out.batch + tl.cast(kv_head, tl.int64) * GROUP * out.head
    pointers += (member.to(tl.int64) * out.head + t.to(tl.int64) * out.token)[:, None] + dim * out.dim
    tl.store(pointers, (acc / total[:, None]).to(out.ptr.dtype.element_ty), mask=value_ok)
