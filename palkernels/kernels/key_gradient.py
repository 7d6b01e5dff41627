"""LAL attention, backward: the gradients of keys and values, of the text and of the audio.

A program holds one block of keys and walks over every query that sees it, of all text rows that read it: shared audio
is summed in registers, in the order of the rows. It computes S^T and dP^T, so that P^T and dS^T are products' left
operands as they stand: a transposed register tile there is miscompiled by Triton 3.4 to 3.7.
:mod:`palkernels.kernels.backward` has the formulas.
"""

import triton
import triton.language as tl
from torch import Tensor

from palkernels.arguments import Call
from palkernels.kernels import tiles
from palkernels.kernels.keys import audio_row, load_visible_from, next_reader, text_row
from palkernels.kernels.launch import Launch, attention_launch
from palkernels.kernels.operands import UNSPECIALISED, Matrix, Sizes
from palkernels.kernels.primitives import (
    accumulator_type,
    base2_scores,
    dot,
    load_rows,
    packed_rows,
    settled,
    softcap_slope,
    split_program,
    store_rows,
)
from palkernels.kernels.statistics import row_block, row_statistics, tile_statistics


@triton.jit
def load_query_tile(
    query, dout, statistics, first, begin, text, kv_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries t (M,), Q and dO (M, BLOCK_D), base-2 LSE (M,) and pointers to delta of packed rows from ``first`` on.

    ``first`` is a multiple of BLOCK_M. Q and dO are zero beyond the last query, and before query ``begin`` unless that
    is None.
    """
    t, member, row_ok = packed_rows(first, text.num_queries, GROUP, BLOCK_M)
    if begin is not None:
        row_ok = row_ok & (t >= begin)
    queries = load_rows(query, text, kv_head * GROUP, t, member, row_ok, HEAD_DIM)
    douts = load_rows(dout, text, kv_head * GROUP, t, member, row_ok, HEAD_DIM)
    lses, deltas = tile_statistics(statistics, first, BLOCK_M, ROW_BLOCK)
    return t, queries, douts, tl.load(lses), deltas


@triton.jit
def add_query_tile(
    gradients,
    keys,
    values,
    queries,
    douts,
    base2_lse,
    deltas,
    visible,
    WITH_KEY: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Add one tile of query rows' share to dK / SCALE and dV of a block of keys."""
    dkey, dvalue = gradients
    scores = base2_scores(dot(keys, tl.trans(queries), None), SCALE, SOFTCAP)  # transposed: (BLOCK_N, BLOCK_M)
    weights = tl.exp2(scores - base2_lse[None, :])
    if visible is not None:
        weights = tl.where(visible, weights, 0.0)
    if WITH_VALUE:
        dvalue = settled(dot(weights.to(douts.dtype), douts, dvalue))
    if WITH_KEY:
        delta = tl.load(deltas)
        dweights = dot(values, tl.trans(douts), None)
        dscores = weights * (dweights - delta[None, :]) * softcap_slope(scores, SOFTCAP)
        if visible is not None:  # again: what no query sees may hold NaN, which times 0 is NaN
            dscores = tl.where(visible, dscores, 0.0)
        dkey = settled(dot(dscores.to(queries.dtype), queries, dkey))
    return dkey, dvalue


@triton.jit
def add_text_row(
    gradients,  # dK / SCALE and dV of the block, each (BLOCK_N, BLOCK_D)
    keys,  # (BLOCK_N, BLOCK_D)
    values,
    seen_from,  # (BLOCK_N,) first position that sees each key; None: every query sees all of them
    valid,  # (BLOCK_N,) the others' gradients are dropped
    text,
    window,
    query,
    dout,
    statistics,  # the text row's, from row_statistics
    kv_head,
    WITH_KEY: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """Add the share of one text row: of its queries that see any key of the block, a tile of packed rows at a time."""
    first_position = text.end - text.num_queries  # of query 0
    masked_end = 0  # a multiple of BLOCK_M, as the first row is
    end = text.num_queries * GROUP
    if seen_from is not None:
        earliest = tl.min(tl.where(valid, seen_from, text.end), axis=0)
        latest = tl.max(tl.where(valid, seen_from, 0), axis=0)
        begin = tl.minimum(tl.maximum(earliest - first_position, 0), text.num_queries)
        start = begin * GROUP // BLOCK_M * BLOCK_M
        if window is None:  # from the query that sees the whole block on, no mask is needed
            partly = tl.maximum(tl.minimum(latest - first_position, text.num_queries) * GROUP, begin * GROUP)
            masked_end = tl.cdiv(partly, BLOCK_M) * BLOCK_M
        else:
            masked_end = tl.minimum(end, tl.maximum(latest + window - first_position, 0) * GROUP)
        for first in range(start, masked_end, BLOCK_M):
            t, queries, douts, base2_lse, deltas = load_query_tile(
                query, dout, statistics, first, begin, text, kv_head, GROUP, HEAD_DIM, BLOCK_M, ROW_BLOCK
            )
            position = first_position + t
            age = position[None, :] - seen_from[:, None]
            visible = age >= 0 if window is None else (age >= 0) & (age < window)
            gradients = add_query_tile(
                gradients, keys, values, queries, douts, base2_lse, deltas, visible, WITH_KEY, WITH_VALUE,
                SCALE, SOFTCAP,
            )  # fmt: skip
    if window is None or seen_from is None:
        for first in range(masked_end, end, BLOCK_M):
            t, queries, douts, base2_lse, deltas = load_query_tile(
                query, dout, statistics, first, None, text, kv_head, GROUP, HEAD_DIM, BLOCK_M, ROW_BLOCK
            )
            gradients = add_query_tile(
                gradients, keys, values, queries, douts, base2_lse, deltas, None, WITH_KEY, WITH_VALUE, SCALE, SOFTCAP
            )
    return gradients


@triton.jit
def store_gradients(
    gradients, valid, dkey, dvalue, row, num_tokens, kv_head, token, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Write those that are wanted; keys that are not valid get zeros."""
    if dkey.ptr is not None:
        values = tl.where(valid[:, None], gradients[0] * SCALE, 0.0)
        store_rows(dkey, row, kv_head, token, 0, token < num_tokens, values, HEAD_DIM)
    if dvalue.ptr is not None:
        values = tl.where(valid[:, None], gradients[1], 0.0)
        store_rows(dvalue, row, kv_head, token, 0, token < num_tokens, values, HEAD_DIM)


@triton.jit
def audio_block(
    query, dout, statistics, key, value, dkey, dvalue, visibility, sizes, program, num_blocks,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of audio tokens, from every text row that reads them."""
    block, kv_head, row = split_program(program, num_blocks, sizes.num_kv_heads)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    audio = audio_row(visibility, row, sizes)
    valid = token < audio.length
    keys = load_rows(key, audio, kv_head, token, 0, valid, HEAD_DIM)
    values = load_rows(value, audio, kv_head, token, 0, valid, HEAD_DIM)
    zeros = tl.zeros(keys.shape, dtype=accumulator_type(keys))
    gradients = (zeros, zeros)

    beyond = block * BLOCK_N >= audio.length  # then no query sees any of the block
    batch = next_reader(visibility, row, tl.where(beyond, sizes.num_batches, 0), sizes)
    while batch < sizes.num_batches:
        text = text_row(visibility, batch, sizes)
        seen_from = None
        if visibility.visible_from is not None:
            seen_from = load_visible_from(visibility, text, audio, token, valid)
        gradients = add_text_row(
            gradients, keys, values, seen_from, valid, text, None, query, dout,
            row_statistics(statistics, text, batch, kv_head, sizes, GROUP, ROW_BLOCK),
            kv_head, dkey.ptr is not None, dvalue.ptr is not None, SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, ROW_BLOCK,
        )  # fmt: skip
        batch = next_reader(visibility, row, batch + 1, sizes)
    store_gradients(gradients, valid, dkey, dvalue, audio, audio.num_tokens, kv_head, token, SCALE, HEAD_DIM)


@triton.jit
def text_block(
    query, dout, statistics, key, value, dkey, dvalue, visibility, sizes, program,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of text keys, from their own row's queries."""
    block, kv_head, batch = split_program(program, tl.cdiv(sizes.num_keys, BLOCK_N), sizes.num_kv_heads)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    text = text_row(visibility, batch, sizes)
    valid = (token >= text.start) & (token < text.end)
    keys = load_rows(key, text, kv_head, token, 0, valid, HEAD_DIM)
    values = load_rows(value, text, kv_head, token, 0, valid, HEAD_DIM)
    zeros = tl.zeros(keys.shape, dtype=accumulator_type(keys))
    gradients = add_text_row(
        (zeros, zeros), keys, values, token, valid, text, sizes.window, query, dout,
        row_statistics(statistics, text, batch, kv_head, sizes, GROUP, ROW_BLOCK),
        kv_head, dkey.ptr is not None, dvalue.ptr is not None, SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, ROW_BLOCK,
    )  # fmt: skip
    store_gradients(gradients, valid, dkey, dvalue, text, text.num_keys, kv_head, token, SCALE, HEAD_DIM)


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_gradient_kernel(
    query,  # Matrix (B, Hkv * GROUP, T, D)
    dout,
    statistics,  # see palkernels.kernels.statistics
    key,  # Matrix (B, Hkv, S, D)
    value,
    dkey,  # Matrix (B, Hkv, S, D), or all None, as the three below
    dvalue,
    audio_key,  # Matrix (A, Hkv, N, D)
    audio_value,
    daudio_key,  # Matrix (A, Hkv, N, D)
    daudio_value,
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
    ROW_BLOCK: tl.constexpr,
):
    # One program: BLOCK_N keys of one (audio row, K/V head), or of one (text row, K/V head). Audio comes first: its
    # programs are the longer ones.
    sizes = Sizes(
        num_queries, num_keys, num_audio, num_audio_rows, num_batches, num_kv_heads, text_tokens, audio_tokens, window
    )
    program = tl.program_id(0)
    audio_programs = 0
    if daudio_key.ptr is not None or daudio_value.ptr is not None:
        num_blocks = tl.cdiv(num_audio, BLOCK_N)
        audio_programs = num_audio_rows * num_kv_heads * num_blocks
        if program < audio_programs:
            audio_block(
                query, dout, statistics, audio_key, audio_value, daudio_key, daudio_value, visibility, sizes,
                program, num_blocks, SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, ROW_BLOCK,
            )  # fmt: skip
    if dkey.ptr is not None or dvalue.ptr is not None:  # noqa: SIM102 (known when compiling; the next is not)
        if program >= audio_programs:
            text_block(
                query, dout, statistics, key, value, dkey, dvalue, visibility, sizes,
                program - audio_programs, SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, ROW_BLOCK,
            )  # fmt: skip


def key_gradient_launch(
    call: Call,
    dout: Tensor,
    statistics: Tensor,
    gradients: dict[str, Tensor | None],
    capability: int | None,
) -> Launch:
    """The launch that fills those of ``gradients`` that are not None: "key", "value", "audio_key", "audio_value"."""
    tile = tiles.choose("key_gradient", capability, call.query.dtype, call.head_dim, call.is_intricate)
    dkey, dvalue, daudio_key, daudio_value = (
        gradients.get(name) for name in ("key", "value", "audio_key", "audio_value")
    )
    num_blocks = 0  # of every row of text and of audio that has a gradient to fill
    if daudio_key is not None or daudio_value is not None:
        num_blocks += call.num_audio_rows * triton.cdiv(call.num_audio, tile.block_n)
    if dkey is not None or dvalue is not None:
        num_blocks += call.num_batches * triton.cdiv(call.num_keys, tile.block_n)
    return attention_launch(
        key_gradient_kernel,
        num_blocks * call.num_kv_heads,
        tile,
        call,
        Matrix.of(call.query),
        Matrix.of(dout),
        statistics,
        *(Matrix.of(tensor) for tensor in (call.key, call.value, dkey, dvalue)),
        *(Matrix.of(tensor) for tensor in (call.audio_key, call.audio_value, daudio_key, daudio_value)),
        ROW_BLOCK=row_block(call, capability),
    )
