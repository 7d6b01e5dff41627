"""LAL attention, backward: the queries' gradient. It walks over keys as forward does, and writes delta on its way.

:mod:`palkernels.kernels.backward` has the formulas.
"""

import triton
import triton.language as tl
from torch import Tensor

from palkernels.arguments import Call
from palkernels.kernels import tiles
from palkernels.kernels.keys import audio_read_by, text_row, visit_keys
from palkernels.kernels.launch import Launch, attention_launch
from palkernels.kernels.operands import UNSPECIALISED, Matrix, Sizes
from palkernels.kernels.primitives import (
    LOG2_E,
    accumulator_type,
    base2_scores,
    dot,
    load_rows,
    packed_rows,
    per_row,
    softcap_slope,
    split_program,
    store_rows,
)
from palkernels.kernels.statistics import row_block, row_statistics, tile_statistics


@triton.jit
def add_key_block(dquery, rows, keys, values, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Add one block of keys' share to dQ / SCALE of a tile of query rows."""
    queries, dout, base2_lse, delta = rows
    scores = base2_scores(dot(queries, tl.trans(keys), None), SCALE, SOFTCAP)
    weights = tl.exp2(scores - base2_lse[:, None])
    dweights = dot(dout, tl.trans(values), None)
    dscores = weights * (dweights - delta[:, None]) * softcap_slope(scores, SOFTCAP)
    if visible is not None:
        dscores = tl.where(visible, dscores, 0.0)
    return dot(dscores.to(keys.dtype), keys, dquery)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_gradient_kernel(
    query,  # Matrix (B, Hkv * GROUP, T, D)
    key,  # Matrix (B, Hkv, S, D)
    value,
    audio_key,  # Matrix (A, Hkv, N, D)
    audio_value,
    out,  # Matrix as query
    dout,
    dquery,  # or all None: only the statistics are written
    lse_ptr,  # (B, Hkv * GROUP, T), contiguous, as the next
    dlse_ptr,  # or None
    statistics,  # see palkernels.kernels.statistics
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
    # One program: BLOCK_M packed query rows of one (text row, K/V head), as in forward, to the end of the last block.
    sizes = Sizes(
        num_queries, num_keys, num_audio, num_audio_rows, num_batches, num_kv_heads, text_tokens, audio_tokens, window
    )
    num_tiles = tl.cdiv(num_queries * GROUP, ROW_BLOCK) * (ROW_BLOCK // BLOCK_M)
    tile, kv_head, batch = split_program(tl.program_id(0), num_tiles, num_kv_heads)
    text = text_row(visibility, batch, sizes)
    audio = audio_read_by(visibility, batch, sizes)
    if tile * BLOCK_M >= tl.cdiv(text.num_queries * GROUP, ROW_BLOCK) * ROW_BLOCK:  # shorter than the longest
        return
    t, member, row_ok = packed_rows(tile * BLOCK_M, text.num_queries, GROUP, BLOCK_M)

    outputs = load_rows(out, text, kv_head * GROUP, t, member, row_ok, HEAD_DIM)
    douts = load_rows(dout, text, kv_head * GROUP, t, member, row_ok, HEAD_DIM)
    acc_type: tl.constexpr = accumulator_type(outputs)
    delta = tl.sum(outputs.to(acc_type) * douts.to(acc_type), axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(per_row(dlse_ptr, text, kv_head, t, member, sizes, GROUP), mask=row_ok, other=0.0)
    base2_lse = tl.load(per_row(lse_ptr, text, kv_head, t, member, sizes, GROUP), mask=row_ok, other=0.0) * LOG2_E
    blocks = row_statistics(statistics, text, batch, kv_head, sizes, GROUP, ROW_BLOCK)
    lses, deltas = tile_statistics(blocks, tile * BLOCK_M, BLOCK_M, ROW_BLOCK)
    tl.store(lses, base2_lse)
    tl.store(deltas, delta)

    if dquery.ptr is not None:
        queries = load_rows(query, text, kv_head * GROUP, t, member, row_ok, HEAD_DIM)
        rows = (queries, douts, base2_lse, delta)
        gradient = visit_keys(
            tl.zeros(queries.shape, dtype=acc_type), add_key_block, rows, rows, None, tile, t, text, audio, kv_head,
            key, value, audio_key, audio_value, visibility, window,
            SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_rows(dquery, text, kv_head * GROUP, t, member, row_ok, gradient * SCALE, HEAD_DIM)


def query_gradient_launch(
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    statistics: Tensor,
    dquery: Tensor | None,
    capability: int | None,
) -> Launch:
    """The launch that fills ``statistics``, and ``dquery`` unless that is None."""
    num_rows = call.group * call.num_queries
    tile = tiles.choose("query_gradient", capability, call.query.dtype, call.head_dim, call.is_intricate)
    rows = row_block(call, capability)
    num_programs = call.num_batches * call.num_kv_heads * triton.cdiv(num_rows, rows) * (rows // tile.block_m)
    matrices = (Matrix.of(tensor) for tensor in (*call.floats().values(), out, dout, dquery))
    dlse = None if dlse is None else dlse.contiguous()
    return attention_launch(
        query_gradient_kernel, num_programs, tile, call, *matrices, lse, dlse, statistics, ROW_BLOCK=rows
    )
