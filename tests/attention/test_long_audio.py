"""Hours of sound: 180,000 audio tokens are an hour at 50 a second."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from support.kernel_runs import strict

from palkernels import lal_attention, lal_attention_varlen
from palkernels.kernels import division, tiles
from palkernels.kernels.operands import Matrix
from palkernels.testing import lal_case, max_error

HOUR = 180_000
EPS = torch.finfo(torch.float32).eps
MULTIPROCESSORS = 132  # an H100's and an H200's
FLOAT_BYTES = 4


def long_tiles(device):
    """Blocks that the interpreter walks over quickly."""
    return tiles.use(tiles.Tile(16, 1024, 4, 1)) if device == "cpu" else contextlib.nullcontext()


def error_of(got, want, case):
    """The largest error of an output, or of an LSE, in units of float32's epsilon and of what is summed."""
    largest = want if want.ndim == 3 else case.tensors[4].nan_to_num()
    return max_error(got, want) / EPS / largest.abs().max().item()


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (9, 9)], ids=["decode", "forward"])
@pytest.mark.parametrize("tokens", [6_000, HOUR])
@torch.no_grad()
def test_an_hour_is_right(device, queries, keys, tokens, record_property):
    """A long clip, and one of odd length with NaN behind it: output and LSE in float32 against float64's.

    In the interpreter sums over 180,000 keys are off by a third of float32's epsilon of the largest value, and the LSE
    by one of its own.
    """
    case = lal_case(batch=2, heads=1, kv_heads=1, queries=queries, keys=keys, audio=tokens, dim=16, device=device)
    case.options["audio_lengths"] = torch.tensor([tokens, tokens - 1_001], device=device)
    for tensor in case.tensors[3:]:
        tensor[1, :, tokens - 1_001 :] = math.nan
    want = lal_attention(*case.to(torch.float64).tensors, **case.options, return_lse=True, impl="reference")
    with long_tiles(device):
        got = lal_attention(*case.tensors, **case.options, return_lse=True, impl="triton")
    for name, x, exact in zip(("out", "lse"), got, want, strict=True):
        error = error_of(x, exact, case)
        record_property(f"{name}, in epsilons", f"{error:.2f}")
        assert error <= (8 if device == "cuda" else 2)  # a GPU sums in another order


@pytest.mark.gpu
@pytest.mark.slow
@torch.no_grad()
def test_loud_tokens_among_many(device):
    """The first key and the last outweigh all others alike: neither is lost, and what is between them vanishes."""
    case = lal_case(batch=1, heads=1, kv_heads=1, queries=1, keys=1, audio=HOUR, dim=16, device=device)
    query, _, _, audio_key, audio_value = case.tensors
    loud = [0, HOUR - 1]
    audio_key[0, 0, loud] = 30 * query[0, 0]
    with long_tiles(device):
        out = lal_attention(*case.tensors, impl="triton")
    assert max_error(out[0, 0, 0], audio_value[0, 0, loud].double().mean(dim=0)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.slow
@torch.no_grad()
def test_an_hour_in_packed_rows(device):
    """An hour, nothing and a minute side by side: each text reads its own."""
    lengths, texts = [HOUR, 0, 3_000], [3, 2, 1]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(tokens, heads, 16, generator=generator).to(device)
        for tokens, heads in ((6, 2), (6, 1), (6, 1), (HOUR + 3_000, 1), (HOUR + 3_000, 1))
    ]
    packing = {
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(texts)], device=device),
        "cu_audio": torch.tensor([0, *itertools.accumulate(lengths)], device=device),
        "max_seqlen": 3,
        "max_audio": HOUR,
    }
    want = lal_attention_varlen(*(x.double() for x in tensors), **packing, impl="reference")
    with long_tiles(device):
        got = lal_attention_varlen(*tensors, **packing, impl="triton")
    assert max_error(got, want) <= 4 * EPS * tensors[4].abs().max().item()


# How models keep an hour's keys (A, Hkv, N, D), by strides in elements: (A, N, Hkv, D), of which rows lie beyond 2^31;
# and a cache of 16 layers' keys and values for each token, of which tokens do.
LAYOUTS = {
    "rows": (13, (HOUR * 8 * 128, 128, 8 * 128, 1), None),
    "tokens": (1, (HOUR * 16 * 2 * 8 * 64, 128, 16 * 2 * 8 * 64, 1), 1),
}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "strides", "wide"), LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_offsets_within_an_hour(device, rows, strides, wide):
    """No product of indices passes 32 bits unseen. Few tokens hold anything: the other pages take no memory."""
    dim, head, loud = 16, 7, [0, 1_023, 90_001, HOUR - 1]
    span = (rows - 1) * strides[0] + (HOUR - 1) * strides[2] + 8 * 128
    assert span > 2**31
    # On a CPU by NumPy, which leaves the zeros to the pages: they take memory when they are written.
    zeros = np.zeros(span, np.float16) if device == "cpu" else None
    memory = torch.zeros(span, dtype=torch.float16, device=device) if zeros is None else torch.from_numpy(zeros)
    views = [memory[head * 128 + first :].as_strided((rows, 1, HOUR, dim), strides) for first in (0, 64)]
    assert Matrix.of(views[0]).wide == wide
    case = lal_case(batch=1, heads=1, kv_heads=1, queries=1, keys=1, audio=len(loud), dim=dim, device=device)
    query, key, value, loud_key, loud_value = (x.half() for x in case.tensors)
    views[0][-1, :, loud] = 4 * loud_key[0]
    views[1][-1, :, loud] = loud_value[0]
    index = torch.tensor([rows - 1], device=device)
    # The other tokens have score 0 and value 0.
    packed = [torch.cat([x, x.new_zeros(1, 1, HOUR - len(loud), dim)], dim=2) for x in (4 * loud_key, loud_value)]
    want = lal_attention(*(x.double() for x in (query, key, value, *packed)), return_lse=True, impl="reference")
    with long_tiles(device), strict(device):
        got = lal_attention(query, key, value, *views, audio_index=index, return_lse=True, impl="triton")
    for x, exact in zip(got, want, strict=True):
        assert max_error(x, exact) <= 1e-5


SHAPES = [(64, 8, 4), (128, 8, 3), (128, 2, 6)]  # D, Hkv and G of Llama 3.2 1B and 3B, and of Qwen2.5 1.5B


@pytest.mark.parametrize("tokens", [6_000, 90_000, HOUR])
@pytest.mark.parametrize(("batch", "clips"), [(1, 1), (12, 12), (12, 1)], ids=str)
@pytest.mark.parametrize(("dim", "kv_heads", "group"), SHAPES, ids=str)
def test_an_hour_is_divided(tokens, batch, clips, dim, kv_heads, group):
    """Most multiprocessors get a program; none reads a tenth more than its share; and what they leave in memory
    is little, however long the sound is."""
    divided = division.Division(batch, clips, kv_heads, tokens, 200, group, dim, 64, MULTIPROCESSORS)
    shares = divided.shares()
    audio_shares, _ = shares
    audio_programs = clips * kv_heads * audio_shares
    assert 0.7 * MULTIPROCESSORS <= divided.num_programs(shares) <= 2.5 * MULTIPROCESSORS
    if tokens >= 90_000:
        assert audio_programs >= 0.9 * MULTIPROCESSORS
    blocks = -(-tokens // 64)
    assert -(-blocks // audio_shares) * 64 <= 1.1 * tokens / audio_shares
    *_, floats = divided.places(shares)
    assert floats * FLOAT_BYTES <= 8 * 2**20
    longer = divided._replace(num_audio=2 * tokens)
    *_, more = longer.places(longer.shares())
    assert more <= 1.7 * floats
