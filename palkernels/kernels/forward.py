"""LAL attention, forward: one online softmax over the audio keys, then over the text keys, from two pointers."""

import triton
import triton.language as tl
from torch import Tensor

from palkernels.arguments import Call
from palkernels.kernels import tiles
from palkernels.kernels.keys import audio_read_by, audio_scale, text_row, visit_keys
from palkernels.kernels.launch import Launch, attention_launch
from palkernels.kernels.operands import UNSPECIALISED, Matrix, Scales, Sizes
from palkernels.kernels.primitives import (
    LN_2,
    accumulator_type,
    load_rows,
    packed_rows,
    per_row,
    split_program,
    store_rows,
)
from palkernels.kernels.softmax import attend


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    query,  # Matrix (B, Hkv * GROUP, T, D)
    key,  # Matrix (B, Hkv, S, D)
    value,
    audio_key,  # Matrix (A, Hkv, N, D)
    audio_value,
    scales,  # of audio_key and audio_value
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
    key_scale, value_scale = None, None
    if scales.key is not None:
        key_scale = audio_scale(scales.key, audio, kv_head, sizes, acc_type)
        value_scale = audio_scale(scales.value, audio, kv_head, sizes, acc_type)
    acc, row_max, row_sum = visit_keys(
        (acc, row_max, row_sum), attend, (queries, None), (queries, key_scale), value_scale,
        tile, t, text, audio, kv_head, key, value, audio_key, audio_value, visibility, window,
        SCALE, SOFTCAP, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    blind = row_sum == 0.0
    total = tl.where(blind, 1.0, row_sum)
    store_rows(out, text, kv_head * GROUP, t, member, row_ok, acc / total[:, None], HEAD_DIM)
    lse = tl.where(blind, float("-inf"), row_max * LN_2 + tl.log(total))
    tl.store(per_row(lse_ptr, text, kv_head, t, member, sizes, GROUP), lse, mask=row_ok)


def forward_launch(call: Call, out: Tensor, lse: Tensor, capability: int | None) -> Launch:
    """The launch that fills ``out`` (B, Hq, T, D), of any strides, and ``lse`` (B, Hq, T), contiguous.

    ``capability`` is 90 for 9.0; None in the interpreter.
    """
    num_rows = call.group * call.num_queries
    tile = tiles.choose("forward", capability, call.query.dtype, call.head_dim, call.is_intricate)
    num_programs = call.num_batches * call.num_kv_heads * triton.cdiv(num_rows, tile.block_m)
    matrices = (Matrix.of(tensor) for tensor in call.floats().values())
    scales = Scales.of(call.audio_key_scale, call.audio_value_scale)
    return attention_launch(forward_kernel, num_programs, tile, call, *matrices, scales, Matrix.of(out), lse)
