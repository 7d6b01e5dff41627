"""Steps that the attention kernels share: loading rows, scores, one online-softmax update.

Scores are kept in base 2 (scaled by log2 e), so that exponentials are single ``exp2`` instructions.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_block(
    base,
    row,
    stride_row,
    stride_dim,
    row_ok,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows (R, BLOCK_D) of a matrix, or as columns (BLOCK_D, R), the right operand of ``q @ k^T``.

    Zero beyond HEAD_DIM and where ``row_ok`` is false; ``row_ok`` None loads every row.
    """
    axis: tl.constexpr = 0 if COLUMNS else 1
    dim = tl.expand_dims(tl.arange(0, BLOCK_D), 1 - axis)
    # 64-bit: a row's stride times its number may pass 2^31.
    pointers = base + tl.expand_dims(row, axis).to(tl.int64) * stride_row + dim.to(tl.int64) * stride_dim
    if row_ok is not None:
        return tl.load(pointers, mask=tl.expand_dims(row_ok, axis) & (dim < HEAD_DIM), other=0.0)
    elif BLOCK_D == HEAD_DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=tl.broadcast_to(dim < HEAD_DIM, pointers.shape), other=0.0)


@triton.jit
def base2_scores(query, key_columns, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """log2(e) * (scale * q k^T), or log2(e) * softcap * tanh(scale * q k^T / softcap)."""
    products = tl.dot(query, key_columns, input_precision="ieee", out_dtype=ACC)
    if SOFTCAP is None:
        return products * (SCALE * LOG2_E)
    else:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); it saturates correctly where exp overflows or vanishes.
        exponential = tl.exp2(products * (2.0 * SCALE * LOG2_E / SOFTCAP))
        return (SOFTCAP * LOG2_E) * (1.0 - 2.0 / (exponential + 1.0))


@triton.jit
def online_softmax_step(acc, row_max, row_sum, scores, value, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Fold one block of base-2 scores (M, N) and values (N, D) into the running maximum, sum and output."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # A row that has seen nothing yet has maximum -inf; exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    decay = tl.exp2(row_max - shift)
    weights = tl.exp2(scores - shift[:, None])
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision="ieee", out_dtype=ACC)
    return acc, new_max, row_sum


@triton.jit
def attend_block(
    acc,
    row_max,
    row_sum,
    query,
    key_base,
    stride_kt,
    stride_kd,
    value_base,
    stride_vt,
    stride_vd,
    index,  # (N,) keys of this block
    loaded,  # (N,) which of them may be read, or None: all
    visible,  # (M or 1, N) which of them each row sees, or None: all
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One block of keys and values for one tile of query rows."""
    key = load_block(key_base, index, stride_kt, stride_kd, loaded, True, HEAD_DIM, BLOCK_D)
    scores = base2_scores(query, key, SCALE, SOFTCAP, ACC)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    value = load_block(value_base, index, stride_vt, stride_vd, loaded, False, HEAD_DIM, BLOCK_D)
    return online_softmax_step(acc, row_max, row_sum, scores, value, visible is not None, ACC)
