"""The steps around the matrix products of audio_kv as Triton kernels; :mod:`palkernels.steps` defines each function.

All are bound by memory. Sums over rows are left by each program in memory and added up in a fixed order.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from palkernels.kernels.launch import Launch

KEY_BLOCK = 32  # tokens per program
ROWS_PER_PROGRAM = 16  # in the norm's gradient, so that the weight's is summed in registers


@triton.constexpr_function
def accumulator(ptr):
    return tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32


@triton.jit
def inverse_rms(square_sum, WIDTH: tl.constexpr, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(square_sum / WIDTH + EPS)


@triton.jit
def load_gain(weight_ptr, column, column_ok, acc_type: tl.constexpr, OFFSET: tl.constexpr):
    return tl.load(weight_ptr + column, mask=column_ok, other=0.0).to(acc_type) + OFFSET


@triton.jit
def normalise_kernel(
    rows_ptr,  # (M, d), contiguous
    weight_ptr,  # (d,) or None
    out_ptr,  # (M, d), contiguous
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program: one row.
    acc_type: tl.constexpr = accumulator(rows_ptr)
    place = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    values = tl.load(rows_ptr + place + column, mask=ok, other=0.0).to(acc_type)
    values *= inverse_rms(tl.sum(values * values, axis=0), WIDTH, EPS)
    if weight_ptr is not None:
        values *= load_gain(weight_ptr, column, ok, acc_type, OFFSET)
    tl.store(out_ptr + place + column, values.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_rows"])
def normalise_gradient_kernel(
    dout_ptr,  # (M, d), contiguous
    rows_ptr,  # (M, d), contiguous
    weight_ptr,  # (d,)
    drows_ptr,  # (M, d), contiguous
    dweight_ptr,  # (programs, d), contiguous, or None
    num_rows,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    # One program: ROWS rows.
    acc_type: tl.constexpr = accumulator(rows_ptr)
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    gain = load_gain(weight_ptr, column, ok, acc_type, OFFSET)
    dweight = tl.zeros([BLOCK], dtype=acc_type)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, num_rows)):
        place = row * WIDTH + column
        values = tl.load(rows_ptr + place, mask=ok, other=0.0).to(acc_type)
        dout = tl.load(dout_ptr + place, mask=ok, other=0.0).to(acc_type)
        inverse = inverse_rms(tl.sum(values * values, axis=0), WIDTH, EPS)
        normalised = values * inverse
        dweight += dout * normalised
        dout *= gain
        mean = tl.sum(dout * normalised, axis=0) / WIDTH
        drow = inverse * (dout - normalised * mean)
        tl.store(drows_ptr + place, drow.to(drows_ptr.dtype.element_ty), mask=ok)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * WIDTH + column, dweight, mask=ok)


@triton.jit
def head_columns(HEAD_DIM: tl.constexpr, TURNED: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """A head's columns as pairs: RoPE turns ``low[i]`` with ``high[i]`` where i < TURNED. And which of both exist."""
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    pair = tl.arange(0, HALF_BLOCK)
    low = tl.where(pair < TURNED, pair, pair + TURNED)
    high = tl.where(pair < TURNED, pair + TURNED, pair + half)
    return pair, low, high, pair < half, (pair < half) & (high < HEAD_DIM)


@triton.jit
def load_turn(
    ptr, batch_stride, token_stride, row, row_ok, num_tokens, pair, TURNED: tl.constexpr, OTHER: tl.constexpr
):
    """Cosines or sines (M, HALF_BLOCK) of rows (M,), for lower and for higher columns; OTHER where nothing turns."""
    place = ((row // num_tokens) * batch_stride + (row % num_tokens) * token_stride)[:, None] + pair[None, :]
    ok = row_ok[:, None] & (pair < TURNED)[None, :]
    acc_type: tl.constexpr = accumulator(ptr)
    lows = tl.load(ptr + place, mask=ok, other=OTHER).to(acc_type)
    return lows, tl.load(ptr + place + TURNED, mask=ok, other=OTHER).to(acc_type)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def finish_keys_kernel(
    keys_ptr,  # (A, N, Hkv, D), contiguous; changed in place
    weight_ptr,  # (D,) or None
    cos_ptr,  # (A or 1, N, R) or None
    sin_ptr,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    num_rows,  # A * N
    num_tokens,  # N
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNED: tl.constexpr,  # R / 2
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program: one head of BLOCK tokens.
    acc_type: tl.constexpr = accumulator(keys_ptr)
    program = tl.program_id(0).to(tl.int64)
    row = program // NUM_HEADS * BLOCK + tl.arange(0, BLOCK)
    row_ok = row < num_rows
    pair, low, high, low_ok, high_ok = head_columns(HEAD_DIM, TURNED, HALF_BLOCK)
    base = keys_ptr + ((row * NUM_HEADS + program % NUM_HEADS) * HEAD_DIM)[:, None]
    low_ok, high_ok = row_ok[:, None] & low_ok[None, :], row_ok[:, None] & high_ok[None, :]
    lows = tl.load(base + low[None, :], mask=low_ok, other=0.0).to(acc_type)
    highs = tl.load(base + high[None, :], mask=high_ok, other=0.0).to(acc_type)
    if weight_ptr is not None:
        inverse = inverse_rms(tl.sum(lows * lows + highs * highs, axis=1), HEAD_DIM, EPS)[:, None]
        lows *= inverse * load_gain(weight_ptr, low, low < HEAD_DIM, acc_type, OFFSET)[None, :]
        highs *= inverse * load_gain(weight_ptr, high, high < HEAD_DIM, acc_type, OFFSET)[None, :]
    if cos_ptr is not None:
        cos_low, cos_high = load_turn(cos_ptr, cos_batch, cos_token, row, row_ok, num_tokens, pair, TURNED, 1.0)
        sin_low, sin_high = load_turn(sin_ptr, sin_batch, sin_token, row, row_ok, num_tokens, pair, TURNED, 0.0)
        lows, highs = lows * cos_low - highs * sin_low, highs * cos_high + lows * sin_high
    tl.store(base + low[None, :], lows.to(keys_ptr.dtype.element_ty), mask=low_ok)
    tl.store(base + high[None, :], highs.to(keys_ptr.dtype.element_ty), mask=high_ok)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def finish_gradient_kernel(
    dkeys_ptr,  # (A, N, Hkv, D), strides below
    dkeys_batch,
    dkeys_token,
    dkeys_head,
    dkeys_dim,
    raw_ptr,  # (A, N, Hkv, D), contiguous, or None, as the weight and its gradient
    weight_ptr,  # (D,)
    out_ptr,  # (A, N, Hkv, D), contiguous
    dweight_ptr,  # (programs, D), contiguous
    cos_ptr,  # (A or 1, N, R) or None
    sin_ptr,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    num_rows,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TURNED: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program: one head of BLOCK tokens.
    acc_type: tl.constexpr = accumulator(out_ptr)
    program = tl.program_id(0).to(tl.int64)
    head = program % NUM_HEADS
    row = program // NUM_HEADS * BLOCK + tl.arange(0, BLOCK)
    row_ok = row < num_rows
    pair, low, high, low_ok, high_ok = head_columns(HEAD_DIM, TURNED, HALF_BLOCK)
    low_ok, high_ok = row_ok[:, None] & low_ok[None, :], row_ok[:, None] & high_ok[None, :]
    place = (row // num_tokens) * dkeys_batch + (row % num_tokens) * dkeys_token + head * dkeys_head
    lows = tl.load(dkeys_ptr + place[:, None] + low.to(tl.int64)[None, :] * dkeys_dim, mask=low_ok, other=0.0)
    highs = tl.load(dkeys_ptr + place[:, None] + high.to(tl.int64)[None, :] * dkeys_dim, mask=high_ok, other=0.0)
    lows, highs = lows.to(acc_type), highs.to(acc_type)
    if cos_ptr is not None:
        cos_low, cos_high = load_turn(cos_ptr, cos_batch, cos_token, row, row_ok, num_tokens, pair, TURNED, 1.0)
        sin_low, sin_high = load_turn(sin_ptr, sin_batch, sin_token, row, row_ok, num_tokens, pair, TURNED, 0.0)
        lows, highs = lows * cos_low + highs * sin_high, highs * cos_high - lows * sin_low
    base = ((row * NUM_HEADS + head) * HEAD_DIM)[:, None]
    if raw_ptr is not None:
        raw_lows = tl.load(raw_ptr + base + low[None, :], mask=low_ok, other=0.0).to(acc_type)
        raw_highs = tl.load(raw_ptr + base + high[None, :], mask=high_ok, other=0.0).to(acc_type)
        inverse = inverse_rms(tl.sum(raw_lows * raw_lows + raw_highs * raw_highs, axis=1), HEAD_DIM, EPS)[:, None]
        raw_lows *= inverse
        raw_highs *= inverse
        sums = dweight_ptr + program * HEAD_DIM
        tl.store(sums + low, tl.sum(lows * raw_lows, axis=0), mask=pair < (HEAD_DIM + 1) // 2)
        tl.store(sums + high, tl.sum(highs * raw_highs, axis=0), mask=(pair < (HEAD_DIM + 1) // 2) & (high < HEAD_DIM))
        lows *= load_gain(weight_ptr, low, low < HEAD_DIM, acc_type, OFFSET)[None, :]
        highs *= load_gain(weight_ptr, high, high < HEAD_DIM, acc_type, OFFSET)[None, :]
        mean = tl.sum(lows * raw_lows + highs * raw_highs, axis=1)[:, None] / HEAD_DIM
        lows, highs = inverse * (lows - raw_lows * mean), inverse * (highs - raw_highs * mean)
    tl.store(out_ptr + base + low[None, :], lows.to(out_ptr.dtype.element_ty), mask=low_ok)
    tl.store(out_ptr + base + high[None, :], highs.to(out_ptr.dtype.element_ty), mask=high_ok)


def normalise(rows: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    rows, weight = _contiguous(rows, weight)
    out = torch.empty_like(rows)
    normalise_launch(rows, weight, out, eps, offset).run()
    return out


def normalise_gradient(
    dnormalised: Tensor, rows: Tensor, weight: Tensor, eps: float, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    dnormalised, rows, weight = _contiguous(dnormalised, rows, weight)
    drows = torch.empty_like(rows)
    sums = _sums(rows, triton.cdiv(rows.shape[0], ROWS_PER_PROGRAM), rows.shape[1]) if wants_weight else None
    normalise_gradient_launch(dnormalised, rows, weight, drows, sums, eps, offset).run()
    return drows, None if sums is None else sums.sum(0)


def finish_keys(
    keys: Tensor, norm_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, offset: float
) -> None:
    (norm_weight,) = _contiguous(norm_weight)
    finish_keys_launch(keys, norm_weight, cos, sin, eps, offset).run()


def finish_gradient(
    dkeys: Tensor,
    raw: Tensor | None,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor | None]:
    (norm_weight,) = _contiguous(norm_weight)
    out = torch.empty(dkeys.shape, dtype=dkeys.dtype, device=dkeys.device)
    sums = None if raw is None else _sums(out, _key_programs(out), out.shape[3])
    finish_gradient_launch(dkeys, raw, norm_weight, cos, sin, out, sums, eps, offset).run()
    return out, None if sums is None else sums.sum(0)


def normalise_launch(rows: Tensor, weight: Tensor | None, out: Tensor, eps: float, offset: float) -> Launch:
    constants = {"WIDTH": rows.shape[1], "EPS": eps, "OFFSET": offset, **_row_block(rows)}
    return Launch(normalise_kernel, rows.shape[0], (rows, weight, out), constants, rows.device)


def normalise_gradient_launch(
    dnormalised: Tensor, rows: Tensor, weight: Tensor, drows: Tensor, sums: Tensor | None, eps: float, offset: float
) -> Launch:
    num_rows, width = rows.shape
    constants = {"WIDTH": width, "EPS": eps, "OFFSET": offset, "ROWS": ROWS_PER_PROGRAM, **_row_block(rows)}
    arguments = (dnormalised, rows, weight, drows, sums, num_rows)
    return Launch(normalise_gradient_kernel, triton.cdiv(num_rows, ROWS_PER_PROGRAM), arguments, constants, rows.device)


def finish_keys_launch(
    keys: Tensor, norm_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, offset: float
) -> Launch:
    arguments = (keys, norm_weight, *_turns(keys, cos, sin))
    return Launch(
        finish_keys_kernel, _key_programs(keys), arguments, _key_constants(keys, cos, eps, offset), keys.device
    )


def finish_gradient_launch(
    dkeys: Tensor,
    raw: Tensor | None,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    sums: Tensor | None,
    eps: float,
    offset: float,
) -> Launch:
    arguments = (dkeys, *dkeys.stride(), raw, norm_weight, out, sums, *_turns(out, cos, sin))
    return Launch(
        finish_gradient_kernel, _key_programs(out), arguments, _key_constants(out, cos, eps, offset), out.device
    )


def _turns(keys: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Any, ...]:
    """Cosines and sines with their strides, the number of rows, and of tokens in each audio row."""
    rows, tokens = keys.shape[:2]
    given: list[Tensor | None] = [None, None]
    strides: list[int | None] = [None] * 4
    if cos is not None and sin is not None:
        given = list(_contiguous(cos, sin))
        strides = [
            stride for x in given if x is not None for stride in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))
        ]
    return (*given, *strides, rows * tokens, tokens)


def _key_programs(keys: Tensor) -> int:
    return triton.cdiv(keys.shape[0] * keys.shape[1], KEY_BLOCK) * keys.shape[2]


def _key_constants(keys: Tensor, cos: Tensor | None, eps: float, offset: float) -> dict[str, Any]:
    num_heads, head_dim = keys.shape[2:]
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "TURNED": 0 if cos is None else cos.shape[-1] // 2,
        "EPS": eps,
        "OFFSET": offset,
        "HALF_BLOCK": triton.next_power_of_2((head_dim + 1) // 2),
        "BLOCK": KEY_BLOCK,
        "num_warps": 4,
    }


def _row_block(rows: Tensor) -> dict[str, int]:
    """The columns of a row, padded, and enough warps that a thread holds few of them."""
    block = triton.next_power_of_2(rows.shape[1])
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _sums(like: Tensor, programs: int, width: int) -> Tensor:
    return torch.empty(programs, width, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _contiguous(*tensors: Tensor | None) -> Iterable[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
