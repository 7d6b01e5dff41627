"""LAL attention, forward: one online softmax over the audio keys, then over the text keys, from two pointers."""

import triton
import triton.language as tl
from torch import Tensor

from palkernels.attention.call import Call
from palkernels.kernels import tiles
from palkernels.kernels.keys import audio_read_by, text_row, visit_keys
from palkernels.kernels.launch import Launch, attention_launch
from palkernels.kernels.operands import UNSPECIALISED, Matrix, Sizes
from palkernels.kernels.primitives import (
    LN_2,
    LOG2_E,
    accumulator_type,
    base2_scores,
    dot,
    load_rows,
    packed_rows,
    per_row,
    split_program,
    store_rows,
)


@triton.constexpr_function
def waiting_factor(scale, softcap):
    """From products to base-2 scores, where that is a positive factor; otherwise None.

    Positive in float32 too: 0 times the -inf of hidden keys would be NaN.
    """
    return scale * LOG2_E.value if softcap is None and scale > 1e-30 else None


@triton.jit
def attend(state, rows, keys, values, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Fold one block of keys and values into the running output, maximum and sum of a tile of query rows."""
    acc, row_max, row_sum = state
    (queries,) = rows
    scores = dot(queries, tl.trans(keys), None)
    # A factor known to be positive waits for the exponent, where it costs nothing: one multiply-add for each score.
    factor: tl.constexpr = waiting_factor(SCALE, SOFTCAP)
    if factor is None:
        scores = base2_scores(scores, SCALE, SOFTCAP)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    block_max = tl.max(scores, axis=1)
    new_max = tl.maximum(row_max, block_max if factor is None else block_max * factor)
    # A row that has seen nothing yet has maximum -inf; exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if visible is not None else new_max
    decay = tl.exp2(row_max - shift)
    weights = tl.exp2((scores if factor is None else scores * factor) - shift[:, None])
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = dot(weights.to(values.dtype), values, acc * decay[:, None])
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    query,  # Matrix (B, Hkv * GROUP, T, D)
    key,  # Matrix (B, Hkv, S, D)
    value,
    audio_key,  # Matrix (A, Hkv, N, D)
    audio_value,
    out,  # Matrix (B, Hkv * GROUP, T, D)
    lse_ptr,  # (B, Hkv * GROUP, T), contiguous
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
    # One program: BLOCK_M packed query rows of one (text row, K/V head).
    sizes = Sizes(
        num_queries, num_keys, num_audio, num_audio_rows, num_batches, num_kv_heads, text_tokens, audio_tokens, window
    )
    num_tiles = tl.cdiv(num_queries * GROUP, BLOCK_M)
    tile, kv_head, batch = split_program(tl.program_id(0), num_tiles, num_kv_heads)
    text = text_row(visibility, batch, sizes)
    audio = audio_read_by(visibility, batch, sizes)
    if tile * BLOCK_M >= text.num_queries * GROUP:  # a packed row shorter than the longest
        return
    t, member, row_ok = packed_rows(tile * BLOCK_M, text.num_queries, GROUP, BLOCK_M)

    queries = load_rows(query, text, kv_head * GROUP, t, member, row_ok, HEAD_DIM)
    acc_type: tl.constexpr = accumulator_type(queries)
    acc = tl.zeros(queries.shape, dtype=acc_type)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=acc_type)
    row_sum = tl.zeros([BLOCK_M], dtype=acc_type)
    acc, row_max, row_sum = visit_keys(
        (acc, row_max, row_sum), attend, (queries,), tile, t, text, audio, kv_head,
        key, value, audio_key, audio_value, visibility, window,
        SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    blind = row_sum == 0.0
    total = tl.where(blind, 1.0, row_sum)
    store_rows(out, text, kv_head * GROUP, t, member, row_ok, acc / total[:, None], HEAD_DIM)
    lse = tl.where(blind, float("-inf"), row_max * LN_2 + tl.log(total))
    tl.store(per_row(lse_ptr, text, kv_head, t, member, sizes, GROUP), lse, mask=row_ok)


def forward_launch(call: Call, out: Tensor, lse: Tensor, capability: int | None) -> Launch:
    """For validated inputs, into ``out`` (B, Hq, T, D), any strides, and ``lse`` (B, Hq, T), contiguous."""
    num_rows = call.group * call.num_queries
    tile = tiles.choose("forward", capability, call.query.dtype, call.head_dim, call.is_intricate)
    num_programs = call.num_batches * call.num_kv_heads * triton.cdiv(num_rows, tile.block_m)
    matrices = (Matrix.of(tensor) for tensor in (*call.floats().values(), out))
    return attention_launch(forward_kernel, num_programs, tile, call, *matrices, lse)
