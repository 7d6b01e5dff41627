"""Steps that forward and backward share: programs to tiles, packed query rows, loads, scores.

Query heads that share a K/V head are packed into a tile's rows, row = t * GROUP + g, so that each key and value is
loaded once for the whole group. Scores are kept in base 2 (scaled by log2 e): exponentials are single ``exp2``s.
"""

import triton
import triton.language as tl

from palkernels.kernels.tiles import padded_head_dim

padded = triton.constexpr_function(padded_head_dim)
# Decided when the kernels are defined: setting the variable later does not reach them.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
PREFETCHED_BITS = tl.constexpr(512)  # by one instruction
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def split_program(program, num_tiles, num_kv_heads):
    """The tile, K/V head and batch row of a program. Neighbours share their K/V head's data in the L2 cache."""
    tile = program % num_tiles
    return tile, program // num_tiles % num_kv_heads, program // num_tiles // num_kv_heads


@triton.jit
def packed_rows(first, num_queries, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query, head within the group, and validity of BLOCK_M packed rows from ``first`` on, each (BLOCK_M,)."""
    row = first + tl.arange(0, BLOCK_M)
    t = row // GROUP
    return t, row % GROUP, t < num_queries


@triton.jit
def block_tokens(first, BLOCK_N: tl.constexpr, SUB_BLOCKS: tl.constexpr):
    """Tokens (BLOCK_N,) from ``first`` on; of several sub-blocks (SUB_BLOCKS, BLOCK_N // SUB_BLOCKS)."""
    if SUB_BLOCKS == 1:
        return first + tl.arange(0, BLOCK_N)
    else:
        SIZE: tl.constexpr = BLOCK_N // SUB_BLOCKS
        return first + tl.arange(0, SUB_BLOCKS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def row_base(matrix, row, head):
    """Where the first token of a Text or Audio ``row`` lies, of a head."""
    base = matrix.ptr + tl.cast(row.batch, tl.int64) * matrix.batch + tl.cast(head, tl.int64) * matrix.head
    return base + tl.cast(row.first, tl.int64) * matrix.token


@triton.jit
def row_pointers(matrix, row, head, token, member, HEAD_DIM: tl.constexpr):
    """Pointers (..., BLOCK_D) to tokens (...) of a Text or Audio ``row``, head ``head + member``, and which columns
    exist (1, BLOCK_D)."""
    dim = tl.arange(0, padded(HEAD_DIM))[None, :]
    column_ok = dim < HEAD_DIM
    if matrix.wide is not None:
        token = token.to(tl.int64)
        dim = dim.to(tl.int64)
    base = row_base(matrix, row, head)
    return base + tl.expand_dims(token * matrix.token + member * matrix.head, -1) + dim * matrix.dim, column_ok


@triton.jit
def load_rows(matrix, row, head, token, member, token_ok, HEAD_DIM: tl.constexpr):
    """Tokens (...) of a row as (..., BLOCK_D), zero beyond HEAD_DIM and where ``token_ok`` is false; None loads them
    all.

    ``member`` (...), or 0, is added to the scalar ``head``.
    """
    pointers, column_ok = row_pointers(matrix, row, head, token, member, HEAD_DIM)
    if token_ok is not None:
        return tl.load(pointers, mask=tl.expand_dims(token_ok, -1) & column_ok, other=0.0)
    elif padded(HEAD_DIM) == HEAD_DIM:
        return tl.load(pointers)
    else:
        if len(pointers.shape) > len(column_ok.shape):
            column_ok = column_ok[None, :, :]
        return tl.load(pointers, mask=tl.broadcast_to(column_ok, pointers.shape), other=0.0)


@triton.jit
def prefetch_rows(matrix, row, head, first, end, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask the L2 cache for the tokens of a row from ``first`` on, below ``end``, BLOCK_N at most and one at least.
    Nothing waits for them."""
    if not INTERPRETED:
        STEP: tl.constexpr = PREFETCHED_BITS // matrix.ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (padded(HEAD_DIM) + STEP - 1) // STEP
        line = tl.arange(0, BLOCK_N * LINES)
        token, dim = tl.minimum(first + line // LINES, end - 1), tl.minimum(line % LINES * STEP, HEAD_DIM - 1)
        if matrix.wide is not None:
            token, dim = token.to(tl.int64), dim.to(tl.int64)
        pointers = row_base(matrix, row, head) + (token * matrix.token + dim * matrix.dim)
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def store_rows(matrix, row, head, token, member, token_ok, values, HEAD_DIM: tl.constexpr):
    """Write values (R, BLOCK_D) to the tokens that :func:`load_rows` would load, in the matrix's dtype."""
    pointers, column_ok = row_pointers(matrix, row, head, token, member, HEAD_DIM)
    tl.store(pointers, values.to(matrix.ptr.dtype.element_ty), mask=token_ok[:, None] & column_ok)


@triton.jit
def per_row(ptr, row, kv_head, t, member, sizes, GROUP: tl.constexpr):
    """Pointers (R,) into a contiguous (B, Hkv * GROUP, T) tensor: the LSE, its gradient."""
    base = ptr + tl.cast(row.batch * sizes.num_kv_heads + kv_head, tl.int64) * (GROUP * sizes.text_tokens) + row.first
    return base + (member * sizes.text_tokens + t)


@triton.jit
def dot(left, right, accumulator):
    """``left @ right + accumulator`` (None: without), in float32, or float64 for float64 inputs; IEEE, never TF32."""
    return tl.dot(left, right, accumulator, input_precision="ieee", out_dtype=accumulator_type(left))


@triton.jit
def widened(values, like):
    """Values in the dtype of ``like``, which holds those of eight bits exactly; of that dtype already, as they are."""
    if values.dtype == like.dtype:
        return values
    elif INTERPRETED:  # it takes NaN for a number, and knows no float64 of eight bits
        is_nan = (values.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F
        return tl.where(is_nan, float("nan"), values.to(tl.float32)).to(like.dtype)
    elif like.dtype == tl.bfloat16:  # the processor knows no other way that is quick
        return values.to(tl.float32).to(like.dtype)
    else:
        return values.to(like.dtype)


@triton.jit
def settled(product):
    """A float32 product, as it is, that stays where it has been computed.

    It goes through a move that the compiler cannot see past and that the assembler removes. Without it the compiler may
    move accumulators about between the products of a pipelined loop, and ptxas then carries these out one by one.
    """
    if INTERPRETED:
        return product
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [product], tl.float32, is_pure=True, pack=1)


@triton.constexpr_function
def accumulator_type(tensor):
    """What sums of a tensor's elements, or of those behind a pointer, are kept in."""
    dtype = tensor.dtype.scalar
    return tl.float64 if (dtype.element_ty if dtype.is_ptr() else dtype) == tl.float64 else tl.float32


@triton.jit
def base2_scores(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """log2(e) * (scale * q k^T), or log2(e) * softcap * tanh(scale * q k^T / softcap)."""
    if SOFTCAP is None:
        return products * (SCALE * LOG2_E)
    else:
        return tanh(products * (SCALE / SOFTCAP)) * (SOFTCAP * LOG2_E)


@triton.jit
def softcap_slope(scores, SOFTCAP: tl.constexpr):
    """Derivative of the capped scores by the uncapped ones, from the capped ones in base 2: 1 - tanh^2."""
    if SOFTCAP is None:
        return 1.0
    else:
        capped = scores / (SOFTCAP * LOG2_E)
        return 1.0 - capped * capped


@triton.jit
def tanh(x):
    # Saturates correctly where exp overflows or vanishes, but its error is absolute: poor for small x.
    large = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    y = x * x
    if x.dtype == tl.float64:  # the series' first left-out term is at most 1e-16 x
        series = -1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))
        return tl.where(y < 0.0003, x * (1.0 + y * series), large)
    else:  # 2.1e-7 x
        return tl.where(y < 0.0156, x * (1.0 + y * (-1 / 3 + y * (2 / 15))), large)
