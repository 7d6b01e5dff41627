"""The step of the online softmax, which forward and decoding share: fold one block of keys into a running output."""

import triton
import triton.language as tl

from palkernels.kernels.primitives import LOG2_E, base2_scores, dot, widened

LEAST_FACTOR = tl.constexpr(1e-30)  # of scores; positive in float32 too: 0 times the -inf of hidden keys would be NaN


@triton.constexpr_function
def waiting_factor(scale, softcap):
    """From products to base-2 scores, where that is a positive factor; otherwise None."""
    return scale * LOG2_E.value if softcap is None and scale > LEAST_FACTOR.value else None


@triton.jit
def attend(state, rows, keys, values, visible, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Fold one block of keys and values into the running output, maximum and sum of a tile of query rows. Every tensor
    may have one dimension more in front.

    ``rows`` are the queries, and what the keys are to be multiplied by, or None. The output has values as they are.
    """
    acc, row_max, row_sum = state
    queries, key_scale = rows
    scores = dot(queries, widened(tl.trans(keys), queries), None)
    values = widened(values, queries)
    # A factor known to be positive waits for the exponent, where it costs nothing: one multiply-add for each score.
    waiting: tl.constexpr = waiting_factor(SCALE, SOFTCAP)
    if waiting is None:
        factor: tl.constexpr = None
        scores = base2_scores(scores if key_scale is None else scores * key_scale, SCALE, SOFTCAP)
    elif key_scale is None:
        factor: tl.constexpr = waiting
    else:
        factor = tl.maximum(key_scale * waiting, LEAST_FACTOR, propagate_nan=tl.PropagateNan.ALL)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    block_max = tl.max(scores, axis=-1)
    new_max = tl.maximum(row_max, block_max if factor is None else block_max * factor)
    # A row that has seen nothing yet has maximum -inf; exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if visible is not None else new_max
    decay = tl.exp2(row_max - shift)
    weights = tl.exp2((scores if factor is None else scores * factor) - tl.expand_dims(shift, -1))
    row_sum = row_sum * decay + tl.sum(weights, axis=-1)
    acc = dot(weights.to(values.dtype), values, acc * tl.expand_dims(decay, -1))
    return acc, new_max, row_sum
