"""The steps around the matrix products of audio_kv as Triton kernels; :mod:`palkernels.projection.steps` defines each.

All are bound by memory. Sums over rows are left by each program in memory and added up in a fixed order.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from palkernels.arguments import Projection
from palkernels.kernels.launch import Launch
from palkernels.kernels.operands import Matrix
from palkernels.kernels.primitives import accumulator_type
from palkernels.kernels.ready import run

KEY_BLOCK = 32  # tokens per program
ROWS_PER_PROGRAM = 16  # in the norm's gradient, so that the weight's is summed in registers


@triton.jit
def load_wide(pointers, mask, other: tl.constexpr):
    """The values in float32, or in float64 where they are."""
    values = tl.load(pointers, mask=mask, other=other)
    return values.to(accumulator_type(values))


@triton.jit
def inverse_rms(square_sum, WIDTH: tl.constexpr, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(square_sum / WIDTH + EPS)


@triton.jit
def load_gain(weight_ptr, column, column_ok, OFFSET: tl.constexpr):
    return load_wide(weight_ptr + column, column_ok, 0.0) + OFFSET


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
    place = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    values = load_wide(rows_ptr + place + column, ok, 0.0)
    values *= inverse_rms(tl.sum(values * values, axis=0), WIDTH, EPS)
    if weight_ptr is not None:
        values *= load_gain(weight_ptr, column, ok, OFFSET)
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
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    ok = column < WIDTH
    gain = load_gain(weight_ptr, column, ok, OFFSET)
    dweight = tl.zeros_like(gain)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, num_rows)):
        place = row * WIDTH + column
        values = load_wide(rows_ptr + place, ok, 0.0)
        dout = load_wide(dout_ptr + place, ok, 0.0)
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
def head_block(
    program, num_rows, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TURNED: tl.constexpr,
    HALF_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows (M,) and the head of a program; the head's columns as pairs: RoPE turns ``low[i]`` with ``high[i]`` where
    i < TURNED. And which of both exist, (M, HALF_BLOCK) each."""
    row = program // NUM_HEADS * BLOCK + tl.arange(0, BLOCK)
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    pair = tl.arange(0, HALF_BLOCK)
    low = tl.where(pair < TURNED, pair, pair + TURNED)
    high = tl.where(pair < TURNED, pair + TURNED, pair + half)
    row_ok = (row < num_rows)[:, None]
    low_ok = row_ok & (pair < half)[None, :]
    return row, program % NUM_HEADS, low, high, low_ok, low_ok & (high < HEAD_DIM)[None, :]


@triton.jit
def load_pairs(base, low, high, low_ok, high_ok):
    """Two (M, HALF_BLOCK) of rows that begin at ``base`` (M, 1), their columns side by side."""
    return load_wide(base + low[None, :], low_ok, 0.0), load_wide(base + high[None, :], high_ok, 0.0)


@triton.jit
def store_pairs(base, low, high, low_ok, high_ok, lows, highs):
    element: tl.constexpr = base.dtype.element_ty
    tl.store(base + low[None, :], lows.to(element), mask=low_ok)
    tl.store(base + high[None, :], highs.to(element), mask=high_ok)


@triton.jit
def load_turns(turn, row, num_tokens, low_ok, TURNED: tl.constexpr, OTHER: tl.constexpr):
    """Cosines or sines of rows (M,), for the lower and the higher columns; OTHER where nothing turns."""
    pair = tl.arange(0, low_ok.shape[1])[None, :]
    ok = low_ok & (pair < TURNED)
    base = turn.ptr + ((row // num_tokens) * turn.batch + (row % num_tokens) * turn.token)[:, None] + pair
    return load_wide(base, ok, OTHER), load_wide(base + TURNED, ok, OTHER)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def finish_keys_kernel(
    keys_ptr,  # (A, N, Hkv, D), contiguous; changed in place
    weight_ptr,  # (D,) or None
    cos,  # Matrix (A, 1, N, R), or all None, as the next
    sin,
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
    program = tl.program_id(0).to(tl.int64)
    row, head, low, high, low_ok, high_ok = head_block(
        program, num_rows, NUM_HEADS, HEAD_DIM, TURNED, HALF_BLOCK, BLOCK
    )
    base = keys_ptr + ((row * NUM_HEADS + head) * HEAD_DIM)[:, None]
    lows, highs = load_pairs(base, low, high, low_ok, high_ok)
    if weight_ptr is not None:
        inverse = inverse_rms(tl.sum(lows * lows + highs * highs, axis=1), HEAD_DIM, EPS)[:, None]
        lows *= inverse * load_gain(weight_ptr, low, low < HEAD_DIM, OFFSET)[None, :]
        highs *= inverse * load_gain(weight_ptr, high, high < HEAD_DIM, OFFSET)[None, :]
    if cos.ptr is not None:
        cos_low, cos_high = load_turns(cos, row, num_tokens, low_ok, TURNED, 1.0)
        sin_low, sin_high = load_turns(sin, row, num_tokens, low_ok, TURNED, 0.0)
        lows, highs = lows * cos_low - highs * sin_low, highs * cos_high + lows * sin_high
    store_pairs(base, low, high, low_ok, high_ok, lows, highs)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def finish_gradient_kernel(
    dkeys,  # Matrix (A, Hkv, N, D)
    raw_ptr,  # (A, N, Hkv, D), contiguous, or None, as the weight and its gradient
    weight_ptr,  # (D,)
    out_ptr,  # (A, N, Hkv, D), contiguous
    dweight_ptr,  # (programs, D), contiguous
    cos,  # Matrix (A, 1, N, R), or all None, as the next
    sin,
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
    program = tl.program_id(0).to(tl.int64)
    row, head, low, high, low_ok, high_ok = head_block(
        program, num_rows, NUM_HEADS, HEAD_DIM, TURNED, HALF_BLOCK, BLOCK
    )
    place = (row // num_tokens) * dkeys.batch + (row % num_tokens) * dkeys.token + head * dkeys.head
    columns = low.to(tl.int64) * dkeys.dim, high.to(tl.int64) * dkeys.dim
    lows, highs = load_pairs(dkeys.ptr + place[:, None], columns[0], columns[1], low_ok, high_ok)
    if cos.ptr is not None:
        cos_low, cos_high = load_turns(cos, row, num_tokens, low_ok, TURNED, 1.0)
        sin_low, sin_high = load_turns(sin, row, num_tokens, low_ok, TURNED, 0.0)
        lows, highs = lows * cos_low + highs * sin_high, highs * cos_high - lows * sin_low
    base = ((row * NUM_HEADS + head) * HEAD_DIM)[:, None]
    if raw_ptr is not None:
        raw_lows, raw_highs = load_pairs(raw_ptr + base, low, high, low_ok, high_ok)
        inverse = inverse_rms(tl.sum(raw_lows * raw_lows + raw_highs * raw_highs, axis=1), HEAD_DIM, EPS)[:, None]
        raw_lows *= inverse
        raw_highs *= inverse
        sums = dweight_ptr + program * HEAD_DIM
        exists = tl.arange(0, HALF_BLOCK) < (HEAD_DIM + 1) // 2
        tl.store(sums + low, tl.sum(lows * raw_lows, axis=0), mask=exists)
        tl.store(sums + high, tl.sum(highs * raw_highs, axis=0), mask=exists & (high < HEAD_DIM))
        lows *= load_gain(weight_ptr, low, low < HEAD_DIM, OFFSET)[None, :]
        highs *= load_gain(weight_ptr, high, high < HEAD_DIM, OFFSET)[None, :]
        mean = tl.sum(lows * raw_lows + highs * raw_highs, axis=1)[:, None] / HEAD_DIM
        lows, highs = inverse * (lows - raw_lows * mean), inverse * (highs - raw_highs * mean)
    store_pairs(out_ptr + base, low, high, low_ok, high_ok, lows, highs)


def normalise(layer: Projection, weight: Tensor | None) -> Tensor:
    rows = layer.flat_states
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    run(lambda: normalise_launch(layer, weight, out), (rows, weight, out), "normalise", *_numbers(layer))
    return out


def normalise_gradient(dnormalised: Tensor, layer: Projection, wants_weight: bool) -> tuple[Tensor, Tensor | None]:
    num_rows, width = dnormalised.shape
    drows = torch.empty_like(dnormalised, memory_format=torch.contiguous_format)
    sums = _sums(drows, triton.cdiv(num_rows, ROWS_PER_PROGRAM), width) if wants_weight else None
    operands = (dnormalised, layer.flat_states, layer.norm_weight, drows, sums)
    build = partial(normalise_gradient_launch, dnormalised, layer, drows, sums)
    run(build, operands, "normalise_gradient", *_numbers(layer))
    return drows, None if sums is None else sums.sum(0)


def finish_keys(keys: Tensor, layer: Projection) -> None:
    if layer.has_finish:
        operands = (keys, layer.k_norm_weight, layer.cos, layer.sin)
        run(lambda: finish_keys_launch(keys, layer), operands, "finish_keys", *_numbers(layer))


def finish_gradient(dkeys: Tensor, raw: Tensor | None, layer: Projection) -> tuple[Tensor, Tensor | None]:
    if not layer.has_finish:
        return dkeys, None
    out = torch.empty(dkeys.shape, dtype=dkeys.dtype, device=dkeys.device)
    sums = None if raw is None else _sums(out, key_programs(out), out.shape[3])
    operands = (dkeys, raw, None if raw is None else layer.k_norm_weight, out, sums, layer.cos, layer.sin)
    build = partial(finish_gradient_launch, dkeys, raw, layer, out, sums)
    run(build, operands, "finish_gradient", *_numbers(layer))
    return out, None if sums is None else sums.sum(0)


def _numbers(layer: Projection) -> tuple[Any, ...]:
    """What a launch depends on besides its operands."""
    return layer.num_kv_heads, layer.eps, layer.norm_offset


def normalise_launch(layer: Projection, weight: Tensor | None, out: Tensor) -> Launch:
    rows = layer.flat_states.contiguous()
    arguments = (rows, _contiguous(weight), out)
    return Launch(normalise_kernel, rows.shape[0], arguments, _row_constants(layer), rows.device)


def normalise_gradient_launch(dnormalised: Tensor, layer: Projection, drows: Tensor, sums: Tensor | None) -> Launch:
    rows = layer.flat_states.contiguous()
    num_rows = rows.shape[0]
    arguments = (dnormalised.contiguous(), rows, _contiguous(layer.norm_weight), drows, sums, num_rows)
    # Left to itself ptxas spills float32 on Ampere, for the sake of more programs.
    limit = 128 if layer.states.dtype == torch.float32 else None
    constants = _row_constants(layer) | {"ROWS": ROWS_PER_PROGRAM, "maxnreg": limit}
    return Launch(normalise_gradient_kernel, triton.cdiv(num_rows, ROWS_PER_PROGRAM), arguments, constants, rows.device)


def finish_keys_launch(keys: Tensor, layer: Projection) -> Launch:
    arguments = (keys, _contiguous(layer.k_norm_weight), *_turns(layer))
    return Launch(finish_keys_kernel, key_programs(keys), arguments, _key_constants(layer), keys.device)


def finish_gradient_launch(
    dkeys: Tensor, raw: Tensor | None, layer: Projection, out: Tensor, sums: Tensor | None
) -> Launch:
    weight = None if raw is None else _contiguous(layer.k_norm_weight)
    arguments = (Matrix.of(dkeys.transpose(1, 2)), raw, weight, out, sums, *_turns(layer))
    return Launch(finish_gradient_kernel, key_programs(out), arguments, _key_constants(layer), out.device)


def key_programs(keys: Tensor) -> int:
    return triton.cdiv(keys.shape[0] * keys.shape[1], KEY_BLOCK) * keys.shape[2]


def _turns(layer: Projection) -> tuple[Any, ...]:
    """Cosines and sines, the number of rows, and of tokens in each audio row."""
    audio_rows, tokens = layer.states.shape[:2]
    turns = (
        Matrix.of(None if x is None else x.contiguous().expand(audio_rows, -1, -1).unsqueeze(1))
        for x in (layer.cos, layer.sin)
    )
    return (*turns, audio_rows * tokens, tokens)


def _row_constants(layer: Projection) -> dict[str, Any]:
    """Among them the columns of a row, padded, and enough warps that a thread holds few of them."""
    width = layer.states.shape[-1]
    block = triton.next_power_of_2(width)
    numbers = {"WIDTH": width, "EPS": layer.eps, "OFFSET": layer.norm_offset}
    return numbers | {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _key_constants(layer: Projection) -> dict[str, Any]:
    return {
        "NUM_HEADS": layer.num_kv_heads,
        "HEAD_DIM": layer.head_dim,
        "TURNED": 0 if layer.cos is None else layer.cos.shape[-1] // 2,
        "EPS": layer.eps,
        "OFFSET": layer.norm_offset,
        "HALF_BLOCK": triton.next_power_of_2((layer.head_dim + 1) // 2),
        "BLOCK": KEY_BLOCK,
        "num_warps": 4,
    }


def _sums(like: Tensor, programs: int, width: int) -> Tensor:
    return torch.empty(programs, width, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
