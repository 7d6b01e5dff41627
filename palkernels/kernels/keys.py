"""Where rows lie, which keys are seen, and the one walk over them that forward and the queries' gradient share."""

import triton
import triton.language as tl

from palkernels.kernels.operands import Audio, Text
from palkernels.kernels.primitives import block_tokens, load_rows

NEVER = tl.constexpr(2**30)


@triton.jit
def clamp(value, low, high):
    """The value between two bounds, as int32: a caller's integers are not checked on a GPU."""
    return tl.minimum(tl.maximum(value, low), high).to(tl.int32)


@triton.jit
def packed_row(cu_ptr, row, total):
    """First token and length of one of the rows that are packed into ``total`` tokens."""
    first = clamp(tl.load(cu_ptr + row), 0, total)
    return first, clamp(tl.load(cu_ptr + row + 1) - first, 0, total - first)


@triton.jit
def text_row(visibility, batch, sizes):
    if visibility.cu_seqlens is not None:
        first, length = packed_row(visibility.cu_seqlens, batch, sizes.text_tokens)
        return Text(0, first, length, length, 0, length)
    else:
        end = sizes.num_keys
        if visibility.text_end is not None:
            end = clamp(tl.load(visibility.text_end + batch), sizes.num_queries, end)
        start = 0
        if visibility.text_start is not None:
            start = clamp(tl.load(visibility.text_start + batch), 0, end)
        return Text(batch, 0, sizes.num_queries, sizes.num_keys, start, end)


@triton.jit
def audio_row(visibility, row, sizes):
    if visibility.cu_audio is not None:
        first, length = packed_row(visibility.cu_audio, row, sizes.audio_tokens)
        return Audio(0, first, length, length)
    else:
        length = sizes.num_audio
        if visibility.audio_lengths is not None:
            length = clamp(tl.load(visibility.audio_lengths + row), 0, length)
        return Audio(row, 0, sizes.num_audio, length)


@triton.jit
def audio_scale(scale, audio, kv_head, sizes, acc_type: tl.constexpr):
    """What one head's keys or values of an audio row are to be multiplied by, from a pointer of ``Scales``. That of a
    row without tokens may be anything: it is not loaded."""
    place = audio.batch * sizes.num_kv_heads + kv_head
    return tl.load(scale + place, mask=audio.length > 0, other=1.0).to(acc_type)


@triton.jit
def scale_values(state, value_scale):
    """A running output, maximum and sum with the output times ``value_scale``, unless that is None."""
    if value_scale is None:
        return state
    else:
        acc, row_max, row_sum = state
        return acc * value_scale, row_max, row_sum


@triton.jit
def audio_read_by(visibility, batch, sizes):
    """The audio row that a text row reads."""
    row = batch
    if visibility.audio_index is not None:
        row = clamp(tl.load(visibility.audio_index + batch), 0, sizes.num_audio_rows - 1)
    return audio_row(visibility, row, sizes)


@triton.jit
def next_reader(visibility, row, first, sizes):
    """The first text row, from ``first`` on, that reads an audio row; num_batches if none does."""
    none = sizes.num_batches
    if visibility.audio_index is None:
        found = tl.where(first <= row, row, none)
    else:
        found = none
        first = tl.cast(first, tl.int32)
        while (found == none) & (first < none):
            rows = first + tl.arange(0, 128)
            index = tl.load(visibility.audio_index + rows, mask=rows < none, other=0)
            index = clamp(index, 0, sizes.num_audio_rows - 1)
            found = tl.min(tl.where((rows < none) & (index == row), rows, none), axis=0)
            first += 128
    return found


@triton.jit
def load_visible_from(visibility, text, audio, token, token_ok):
    """First position (R,) that sees each audio token, as int32. One from ``text.end`` on becomes NEVER: a tile's rows
    beyond the last query have positions too, and must not reach a token that may hold anything."""
    batch = tl.cast(text.batch, tl.int64)
    place = audio.first + token.to(tl.int64)
    offset = batch * visibility.visible_from_batch + place * visibility.visible_from_token
    first = tl.load(visibility.visible_from + offset, mask=token_ok, other=0)
    return tl.where(first < text.end, tl.maximum(first, 0), NEVER).to(tl.int32)


@triton.jit
def visit_whole_blocks(
    state, step: tl.constexpr, rows, first, end, row, kv_head, key, value,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    SUB_BLOCKS: tl.constexpr = 1,
):  # fmt: skip
    """Fold ``step`` over keys that every query row sees; ``end - first`` is a multiple of BLOCK_N.

    With several sub-blocks the state has one output for each, and the rows are there as often.
    """
    for start in range(first, end, BLOCK_N):
        token = block_tokens(start, BLOCK_N, SUB_BLOCKS)
        keys = load_rows(key, row, kv_head, token, 0, None, HEAD_DIM)
        values = load_rows(value, row, kv_head, token, 0, None, HEAD_DIM)
        state = step(state, rows, keys, values, None, SCALE, SOFTCAP)
    return state


@triton.jit
def visit_audio(
    state, step: tl.constexpr, rows, position, text, audio, kv_head, key, value, visibility,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold ``step`` over the audio that a text row sees, whose query rows are at ``position`` (M,)."""
    full_end = 0
    if visibility.visible_from is None:
        full_end = audio.length // BLOCK_N * BLOCK_N
        state = visit_whole_blocks(
            state, step, rows, 0, full_end, audio, kv_head, key, value, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N
        )
    for first in range(full_end, audio.length, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        loaded = token < audio.length
        visible = loaded[None, :]
        if visibility.visible_from is not None:
            visible_from = load_visible_from(visibility, text, audio, token, loaded)
            loaded = loaded & (visible_from < NEVER)
            visible = loaded[None, :] & (visible_from[None, :] <= position[:, None])
        keys = load_rows(key, audio, kv_head, token, 0, loaded, HEAD_DIM)
        values = load_rows(value, audio, kv_head, token, 0, loaded, HEAD_DIM)
        state = step(state, rows, keys, values, visible, SCALE, SOFTCAP)
    return state


@triton.jit
def visit_text(
    state, step: tl.constexpr, rows, position, tile_first, first, end, text, kv_head, key, value, window,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    SUB_BLOCKS: tl.constexpr = 1,
):  # fmt: skip
    """Fold ``step`` over those of the text keys from ``first`` on, below ``end``, that query rows at ``position`` (M,)
    see, the first of them at ``tile_first``. ``end`` is at most one past the last query's."""
    if window is not None:
        first = tl.maximum(first, tile_first - window + 1)
    full_end = first
    if window is None:  # then every row of the tile sees the keys up to its first row's position
        full_end += tl.maximum(tl.minimum(tile_first + 1, end) - first, 0) // BLOCK_N * BLOCK_N
        state = visit_whole_blocks(
            state, step, rows, first, full_end, text, kv_head, key, value, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N, SUB_BLOCKS
        )
    for start in range(full_end, end, BLOCK_N):
        token = block_tokens(start, BLOCK_N, SUB_BLOCKS)
        loaded = token < end
        visible = tl.expand_dims(loaded, -2) & (tl.expand_dims(token, -2) <= position[:, None])
        if window is not None:
            visible = visible & (tl.expand_dims(token, -2) > position[:, None] - window)
        keys = load_rows(key, text, kv_head, token, 0, loaded, HEAD_DIM)
        values = load_rows(value, text, kv_head, token, 0, loaded, HEAD_DIM)
        state = step(state, rows, keys, values, visible, SCALE, SOFTCAP)
    return state


@triton.jit
def visit_keys(
    state,
    step: tl.constexpr,  # (state, rows, keys (N, D), values (N, D), visible (M or 1, N) or None: all, ...) -> state
    rows,  # what the step needs of the query rows, for text
    audio_rows,  # and for audio
    value_scale,  # of the audio; None: the values are what they are
    tile,  # packed rows tile * BLOCK_M and on
    t,  # (M,) their queries
    text,
    audio,
    kv_head,
    key,
    value,
    audio_key,
    audio_value,
    visibility,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Fold ``step`` over every block of keys that a tile of query rows sees: audio first, then text.

    Blocks that every row sees in full go without a mask. A key that no query of the text row sees may hold anything:
    it is not loaded, and reads as zero.
    """
    first_position = text.end - text.num_queries  # of query 0
    position = first_position + t
    tile_first = first_position + tile * BLOCK_M // GROUP
    tile_last = first_position + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, text.num_queries - 1)
    state = visit_audio(
        state, step, audio_rows, position, text, audio, kv_head, audio_key, audio_value, visibility,
        SCALE, SOFTCAP, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    return visit_text(
        scale_values(state, value_scale), step, rows, position, tile_first, text.start, tile_last + 1, text, kv_head,
        key, value, window, SCALE, SOFTCAP, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
