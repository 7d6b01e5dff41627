"""LAL attention, forward, for Hopper in Gluon: warps that copy keys and values beside warpgroups that compute.

One producer copies blocks of keys and values, audio first, then text, into two rings of shared memory. Each consumer, a
warpgroup with query rows of its own, folds every block into its running output, by the online softmax of
:mod:`palkernels.kernels.softmax`. They meet at barriers alone: a stage of a ring is ready when all copies of its block
have landed, and free when every consumer has left it. While one consumer waits for its products, the others have the
multiprocessor's exponentials.
"""

from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from palkernels.arguments import Call
from palkernels.kernels.gluon.choice import LAYOUTS
from palkernels.kernels.keys import audio_read_by, text_row
from palkernels.kernels.launch import Launch, attention_launch
from palkernels.kernels.operands import UNSPECIALISED, Matrix, Sizes
from palkernels.kernels.primitives import LN_2, LOG2_E, per_row, split_program

# Triton 3.9 has it under this name alone, 3.6 under the other.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
WARPS = gl.constexpr(4)  # of the producer and of each consumer: a warpgroup
THREADS = gl.constexpr(128)
PRODUCER_REGISTERS = gl.constexpr(56)  # of a thread


class Ring(NamedTuple):
    """Blocks in shared memory that are filled and emptied in turn; built inside the kernel."""

    blocks: Any  # (STAGES, BLOCK_N, HEAD_DIM)
    ready: Any  # (STAGES, 1), barriers
    free: Any


class Walk(NamedTuple):
    """The blocks of keys that a program's rows see, audio's first; built inside the kernel."""

    audio_blocks: Any
    num_blocks: Any  # at least one, which may have no key
    audio_end: Any  # one past the last valid audio token
    text_start: Any
    text_end: Any  # one past the last text key that a row sees


@gluon.jit
def ring(
    dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, readers: gl.constexpr
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)
    blocks = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=THREADS)
        mbarrier.init(free.index(stage), count=readers)
    return Ring(blocks, ready, free)


@gluon.jit
def turn(i, STAGES: gl.constexpr):
    """The stage of block ``i`` in a ring, and the parity of its turn there."""
    return i % STAGES, (i // STAGES) & 1


@gluon.jit
def row_pointers(matrix, batch, head, token, dim):
    """Pointers (R, D) to tokens (R,) of one head, or of heads (R,)."""
    if matrix.wide is not None:
        head = gl.cast(head, gl.int64)
        token = token.to(gl.int64)
    base = matrix.ptr + gl.cast(batch, gl.int64) * matrix.batch
    return base + (head * matrix.head + token * matrix.token)[:, None] + dim[None, :]


@gluon.jit
def copy_rows(matrix, batch, head, token, token_ok, to, HEAD_DIM: gl.constexpr, layout: gl.constexpr):
    """Begin to copy tokens (R,) to shared memory (R, D), zeros where not ``token_ok``."""
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    pointers = row_pointers(matrix, batch, head, token, dim)
    mask = token_ok[:, None] & (dim < HEAD_DIM)[None, :]
    async_load(to, pointers, mask=mask)


@gluon.jit
def copy_blocks(
    key, value, batch, head, first, end, begin, stop, keys, values,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Blocks ``begin`` to ``stop`` of the walk: a row's tokens from ``first`` on, below ``end``."""
    for i in range(begin, stop):
        stage, parity = turn(i, STAGES)
        token = first + (i - begin) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
        mbarrier.wait(keys.free.index(stage), parity ^ 1)
        copy_rows(key, batch, head, token, token < end, keys.blocks.index(stage), HEAD_DIM, layout)
        async_copy.mbarrier_arrive(keys.ready.index(stage), increment_count=False)  # when all copies so far have landed
        mbarrier.wait(values.free.index(stage), parity ^ 1)
        copy_rows(value, batch, head, token, token < end, values.blocks.index(stage), HEAD_DIM, layout)
        async_copy.mbarrier_arrive(values.ready.index(stage), increment_count=False)


@gluon.jit
def produce(
    query, key, value, audio_key, audio_value, queries, keys, values, walk, text, audio, kv_head, first_row,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Copy all that the consumers read: their query rows, then the blocks of keys and values."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [WARPS, 1], [1, 0])
    for consumer in gl.static_range(CONSUMERS):
        row = first_row + consumer * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        t = row // GROUP
        head = kv_head * GROUP + row % GROUP
        copy_rows(query, text.batch, head, t, t < text.num_queries, queries.index(consumer), HEAD_DIM, layout)
    copy_blocks(
        audio_key, audio_value, audio.batch, kv_head, 0, walk.audio_end, 0, walk.audio_blocks,
        keys, values, HEAD_DIM, BLOCK_N, STAGES, layout,
    )  # fmt: skip
    copy_blocks(
        key, value, text.batch, kv_head, walk.text_start, walk.text_end, walk.audio_blocks, walk.num_blocks,
        keys, values, HEAD_DIM, BLOCK_N, STAGES, layout,
    )  # fmt: skip


@gluon.jit
def hide(scores, i, walk, position, first_position, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Scores (M, N) of block ``i``, -inf for keys beyond what the rows at ``position`` (M,), the first given, see."""
    is_audio = i < walk.audio_blocks
    first = gl.where(is_audio, i * BLOCK_N, walk.text_start + (i - walk.audio_blocks) * BLOCK_N)
    if first + BLOCK_N > gl.where(is_audio, walk.audio_end, first_position + 1):
        token = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        end = gl.where(is_audio, walk.audio_end, position + 1)
        scores = gl.where(token[None, :] < end[:, None], scores, float("-inf"))
    return scores


@gluon.jit
def consume(
    out, lse_ptr, queries, keys, values, walk, sizes, text, kv_head, first_row,
    SCALE: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Output and LSE of BLOCK_M packed query rows from ``first_row`` on."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    factor: gl.constexpr = SCALE * LOG2_E
    t = (first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, scores_layout))) // GROUP
    position = text.end - text.num_queries + t
    first_position = text.end - text.num_queries + first_row // GROUP

    rows = queries.index(CONSUMER)  # which have landed before the first keys
    no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, scores_layout)
    acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, out_layout)
    row_max = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    row_sum = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, scores_layout))
    for i in range(walk.num_blocks):
        stage, parity = turn(i, STAGES)
        mbarrier.wait(keys.ready.index(stage), parity)
        fence_async_shared()  # between copies to shared memory and a product that reads it
        block = keys.blocks.index(stage).permute((1, 0))
        scores = warpgroup_mma(rows, block, no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(keys.free.index(stage))

        scores = hide(scores, i, walk, position, first_position, BLOCK_N, scores_layout)
        new_max = gl.maximum(row_max, gl.max(scores, axis=1) * factor)
        # A row that has seen nothing yet has maximum -inf; exp2(-inf - 0) is 0 where exp2(-inf + inf) is NaN.
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
        decay = gl.exp2(row_max - shift)
        weights = gl.exp2(scores * factor - shift[:, None])
        row_sum = row_sum * decay + gl.sum(weights, axis=1)
        row_max = new_max
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, out_layout))[:, None]
        weights = gl.convert_layout(weights.to(rows.dtype), gl.DotOperandLayout(0, out_layout, 2))

        mbarrier.wait(values.ready.index(stage), parity)
        fence_async_shared()
        acc = warpgroup_mma(weights, values.blocks.index(stage), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
        mbarrier.arrive(values.free.index(stage))

    blind = row_sum == 0.0
    total = gl.where(blind, 1.0, row_sum)
    lse = gl.where(blind, float("-inf"), row_max * LN_2 + gl.log(total))
    member = (first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, scores_layout))) % GROUP
    gl.store(per_row(lse_ptr, text, kv_head, t, member, sizes, GROUP), lse, mask=t < text.num_queries)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, out_layout))[:, None]
    row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, out_layout))
    t = row // GROUP
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, out_layout))
    pointers = row_pointers(out, text.batch, kv_head * GROUP + row % GROUP, t, dim)
    gl.store(pointers, acc.to(rows.dtype), mask=(t < text.num_queries)[:, None] & (dim < HEAD_DIM)[None, :])


@gluon.jit
def partition(
    query, key, value, audio_key, audio_value, out, lse_ptr, queries, keys, values, walk, sizes, text, audio, kv_head,
    first_row, SCALE: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, ROLE: gl.constexpr,
):  # fmt: skip
    """A program's part for one warpgroup: consumer ROLE, or after the last of these the producer."""
    if ROLE < CONSUMERS:
        consume(
            out, lse_ptr, queries, keys, values, walk, sizes, text, kv_head, first_row + ROLE * BLOCK_M,
            SCALE, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, ROLE,
        )  # fmt: skip
    else:
        produce(
            query, key, value, audio_key, audio_value, queries, keys, values, walk, text, audio, kv_head, first_row,
            GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CONSUMERS,
        )  # fmt: skip


@gluon.jit(do_not_specialize=UNSPECIALISED)
def gluon_forward_kernel(
    query,  # Matrix (B, Hkv * GROUP, T, D); of all of them dim is 1, and the other strides are multiples of 16
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
    window,  # None, as SOFTCAP
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    # One program: CONSUMERS * BLOCK_M packed query rows of one (text row, K/V head).
    sizes = Sizes(
        num_queries, num_keys, num_audio, num_audio_rows, num_batches, num_kv_heads, text_tokens, audio_tokens, window
    )
    num_tiles = gl.cdiv(num_queries * GROUP, CONSUMERS * BLOCK_M)
    tile, kv_head, batch = split_program(gl.program_id(0), num_tiles, num_kv_heads)
    text = text_row(visibility, batch, sizes)
    audio = audio_read_by(visibility, batch, sizes)
    first_row = tile * CONSUMERS * BLOCK_M
    last_query = gl.minimum((first_row + CONSUMERS * BLOCK_M - 1) // GROUP, num_queries - 1)
    text_end = text.end - num_queries + last_query + 1
    audio_blocks = gl.cdiv(audio.length, BLOCK_N)
    num_blocks = gl.maximum(audio_blocks + gl.cdiv(gl.maximum(text_end - text.start, 0), BLOCK_N), 1)
    walk = Walk(audio_blocks, num_blocks, audio.length, text.start, text_end)

    dtype: gl.constexpr = query.ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], dtype)
    queries = gl.allocate_shared_memory(dtype, [CONSUMERS, BLOCK_M, HEAD_DIM], layout)
    keys = ring(dtype, STAGES, BLOCK_N, HEAD_DIM, CONSUMERS)
    values = ring(dtype, STAGES, BLOCK_N, HEAD_DIM, CONSUMERS)
    gl.warp_specialize(
        [
            (partition, (
                query, key, value, audio_key, audio_value, out, lse_ptr, queries, keys, values, walk, sizes, text,
                audio, kv_head, first_row, SCALE, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, role,
            ))
            for role in (0, 1, 2, 3, 4)[: CONSUMERS + 1]
        ],
        [WARPS] * CONSUMERS,
        [REGISTERS] * (CONSUMERS - 1) + [PRODUCER_REGISTERS],
    )  # fmt: skip


def gluon_forward_launch(call: Call, out: Tensor, lse: Tensor) -> Launch:
    """The launch for a call that :func:`choice.takes` takes; it fills ``out`` and ``lse`` as the Triton kernel does."""
    layout = LAYOUTS[call.head_dim]
    rows = layout.consumers * layout.tile.block_m
    num_programs = call.num_batches * call.num_kv_heads * triton.cdiv(call.group * call.num_queries, rows)
    matrices = (Matrix.of(tensor) for tensor in (*call.floats().values(), out))
    constants = {"STAGES": layout.stages, "CONSUMERS": layout.consumers, "REGISTERS": layout.registers}
    return attention_launch(gluon_forward_kernel, num_programs, layout.tile, call, *matrices, lse, **constants)
