"""Decoding: up to 8 queries per row, keys split over programs, which the last one merges."""

import itertools
import math

import pytest
import torch
from support.kernel_runs import strict

from palkernels import lal_attention
from palkernels.arguments import INTEGERS, Call
from palkernels.kernels import decode, division, tiles
from palkernels.kernels.forward import forward_launch
from palkernels.testing import FEATURES, fill_unreachable, lal_case, max_error

SHAPE = {"heads": 6, "kv_heads": 2, "keys": 50, "audio": 45, "dim": 20}


def call_of(case):
    options = dict.fromkeys(INTEGERS) | {"scale": case.tensors[0].shape[-1] ** -0.5} | case.options
    return Call(*case.tensors, **options)


def run(launch, call):
    """Output and LSE of a launch into memory that holds NaN."""
    query = call.query
    batch, heads, queries, dim = query.shape
    out = query.new_full((batch, queries, heads, dim), math.nan).transpose(1, 2)
    lse = query.new_full((batch, heads, queries), math.nan, dtype=torch.promote_types(query.dtype, torch.float32))
    launch(call, out, lse, capability(query.device)).run()
    return out, lse


def capability(device):
    return None if device.type == "cpu" else tiles.capability(device)


@pytest.fixture
def decoded(monkeypatch):
    """The calls that took the decoding path."""
    launches = []
    launch = decode.decode_launch

    def record(*args, **kwargs):
        launches.append(args)
        return launch(*args, **kwargs)

    monkeypatch.setattr(decode, "decode_launch", record)
    return launches


@pytest.fixture
def parts(monkeypatch):
    """What launches leave for their last program, in memory that held NaN; and counters that held zeros."""
    left = []

    def poisoned(*args):
        acc, row_max, row_sum, arrived = make(*args)
        left.append((acc.fill_(math.nan), row_max, row_sum, arrived))
        return left[-1]

    make = decode._parts
    monkeypatch.setattr(decode, "_parts", poisoned)
    return left


SHARED, SPLIT = tiles.Tile(32, 16, 4, 1), tiles.Tile(32, 32, 2, 1, splits_keys=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [SHARED, SPLIT], ids=["shared", "split"])
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("features", [(), ("index",), ("lengths", "text_start", "text_end"), FEATURES], ids=len)
def test_equals_prefill(queries, features, tile, device, parts):
    """Decoding agrees with the kernel that does not split, and with the definition."""
    dtype, bound = (torch.float64, 1e-12) if device == "cpu" else (torch.float32, 1e-5)
    case = lal_case(
        batch=5, queries=queries, features=features, audio_rows=3, seed=queries, dtype=dtype, device=device,
        poison=True, **SHAPE,
    )  # fmt: skip
    want = lal_attention(*case.to(torch.float64).tensors, **case.options, return_lse=True, impl="reference")
    call = call_of(fill_unreachable(case, math.nan))
    with tiles.use(tile), strict(device):
        assert decode.takes(call, capability(call.query.device))
        for launch in (decode.decode_launch, forward_launch):
            for got, exact in zip(run(launch, call), want, strict=True):
                assert max_error(got, exact) <= bound


@pytest.mark.cuda_only
@pytest.mark.gpu
def test_a_cuda_graph_decodes():
    """Lengths live on the device: a captured graph follows them, and waits for nothing."""
    features = ("lengths", "index", "text_end")
    case = lal_case(batch=5, queries=1, features=features, audio_rows=3, device="cuda", **SHAPE)
    case.options.update({name: case.options[name].long() for name in INTEGERS if name in case.options})
    lal_attention(*case.tensors, **case.options, impl="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lal_attention(*case.tensors, **case.options, impl="triton")
    for length in (45, 7, 0):
        case.options["audio_lengths"].fill_(length)
        case.options["text_end"].fill_(length + 1)
        graph.replay()
        graph.replay()  # the counters are zeros again
        assert max_error(out, lal_attention(*case.tensors, **case.options, impl="reference")) <= 1e-4


# Audio and text tokens of each row, all, none and some of each: three shares of audio, four of text.
KEYS = [(45, 50), (0, 0), (1, 0), (0, 1), (17, 40), (45, 0)]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [SHARED, SPLIT], ids=["shared", "split"])
@pytest.mark.parametrize("queries", [1, 4])
def test_shares_without_keys_leave_nothing(parts, tile, queries, device):
    """A short clip beside a long one, and rows that see no clip, no text or neither: only what has keys is stored."""
    dtype, bound = (torch.float64, 1e-12) if device == "cpu" else (torch.float32, 1e-5)
    case = lal_case(batch=len(KEYS), queries=queries, seed=queries, dtype=dtype, device=device, poison=True, **SHAPE)
    audio, text = (torch.tensor(x, device=device) for x in zip(*KEYS, strict=True))
    case.options.update(audio_lengths=audio, text_start=50 - text)
    want = lal_attention(*case.to(torch.float64).tensors, **case.options, return_lse=True, impl="reference")
    call = call_of(fill_unreachable(case, math.nan))
    with tiles.use(tile), pytest.MonkeyPatch.context() as patches:
        patches.setattr(division, "multiprocessors_of", lambda *args: 1000)
        audio_shares, text_shares = decode.division_of(call, capability(call.query.device)).shares()
        assert (audio_shares, text_shares) == (-(-45 // tile.block_n), -(-50 // tile.block_n))
        for got, exact in zip(run(decode.decode_launch, call), want, strict=True):
            assert max_error(got, exact) <= bound
    acc, _, _, arrived = parts[-1]
    rows = queries * call.group
    acc = acc[: len(KEYS) * 2 * (audio_shares + text_shares) * rows * 20]
    stored = acc.view(len(KEYS), 2, audio_shares + text_shares, rows * 20).isfinite().all(-1)
    for row, (heard, read) in enumerate(KEYS):
        has = [first < heard for first in range(0, 45, tile.block_n)]
        has += [first < read for first in range(0, 50, tile.block_n)]
        assert stored[row].tolist() == [has] * 2
    assert not arrived.any()


def test_a_launch_that_is_interrupted_does_no_harm():
    """In the interpreter, where a launch can end halfway, the next one counts from zero."""
    from support import interpreter

    case = lal_case(batch=2, queries=2, **SHAPE)
    want = lal_attention(*case.tensors, impl="reference")

    def interrupt(programs):
        yield from list(programs)[:3]
        raise KeyboardInterrupt

    with interpreter.in_order(interrupt), pytest.raises(KeyboardInterrupt):
        lal_attention(*case.tensors, impl="triton")
    assert max_error(lal_attention(*case.tensors, impl="triton"), want) <= 1e-5


@pytest.mark.parametrize(("queries", "taken"), [(0, False), (1, True), (8, True), (9, False)])
def test_which_calls_decode(decoded, queries, taken):
    case = lal_case(batch=2, queries=queries, **SHAPE)
    lal_attention(*case.tensors, impl="triton")
    assert bool(decoded) == taken


def test_groups_that_do_not_fit_a_tile_do_not_decode(decoded):
    case = lal_case(batch=1, queries=8, **SHAPE | {"heads": 64})
    out = lal_attention(*case.tensors, impl="triton")
    assert not decoded
    assert max_error(out, lal_attention(*case.tensors, impl="reference")) <= 1e-5


@pytest.mark.parametrize("readers", [1, 7, 40])
def test_readers_of_one_clip_share_its_loads(readers, monkeypatch):
    """As many readers as fit into a tile share each load; a clip that nobody reads is not loaded."""
    case = lal_case(batch=readers, queries=1, features=("index",), audio_rows=3, dtype=torch.float64, **SHAPE)
    case.options["audio_index"] = torch.full((readers,), 1)
    case.tensors[3][0::2] = case.tensors[4][0::2] = math.nan
    out = lal_attention(*case.tensors, **case.options, impl="triton")
    assert max_error(out, lal_attention(*case.tensors, **case.options, impl="reference")) <= 1e-12


@pytest.mark.parametrize("features", [("lengths", "text_end"), ("lengths", "window")], ids="-".join)
@pytest.mark.parametrize("tile", [tiles.Tile(16, 16, 4, 1), SPLIT], ids=["shared", "split"])
@pytest.mark.parametrize("programs", [1, 3, 14, 1000])
def test_any_number_of_splits(monkeypatch, programs, features, tile):
    """The keys go to one program or to one for each block, or three blocks to two; counters are zeros again."""
    monkeypatch.setattr(division, "multiprocessors_of", lambda *args: programs)
    zeros = torch.zeros(4, dtype=torch.int32)
    monkeypatch.setattr(decode, "_zeros", lambda *args: zeros)
    case = lal_case(batch=2, queries=2, features=features, dtype=torch.float64, **SHAPE)
    want = lal_attention(*case.tensors, **case.options, return_lse=True, impl="reference")
    with tiles.use(tile):
        for _ in range(2):
            for got, exact in zip(run(decode.decode_launch, call_of(case)), want, strict=True):
                assert max_error(got, exact) <= 1e-12
            assert not zeros.any()


@pytest.mark.parametrize("dim", [32, 64, 65, 128])
def test_parts_of_any_head_dim(monkeypatch, dim):
    """How many are merged at once depends on it; there are five of seven shares that have keys."""
    monkeypatch.setattr(division, "multiprocessors_of", lambda *args: 1000)
    case = lal_case(batch=2, queries=1, dtype=torch.float64, **SHAPE | {"dim": dim})
    case.options.update(audio_lengths=torch.tensor([17, 45]), text_start=torch.tensor([10, 20]))
    want = lal_attention(*case.tensors, **case.options, return_lse=True, impl="reference")
    with tiles.use(SHARED):
        for got, exact in zip(run(decode.decode_launch, call_of(case)), want, strict=True):
            assert max_error(got, exact) <= 1e-12


def test_programs_may_end_in_any_order(monkeypatch):
    """The program that arrives last merges, whichever it is, to the same bits."""
    from support import interpreter

    case = lal_case(batch=2, queries=2, features=("index", "visible_from"), audio_rows=2, **SHAPE)
    results = []
    with tiles.use(tiles.Tile(32, 16, 4, 1)):
        call = call_of(case)
        for order in (lambda x: x, reversed, lambda x: [*x[1::2], *x[::2]]):
            with interpreter.in_order(order):
                results.append(run(decode.decode_launch, call))
    for got, want in itertools.product(results[1:], results[:1]):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_gradients_of_decoded_rows():
    case = lal_case(batch=3, queries=2, features=("index",), audio_rows=2, dtype=torch.float64, **SHAPE)
    results = []
    for impl in ("triton", "reference"):
        leaves = case.requires_grad().tensors
        out, lse = lal_attention(*leaves, **case.options, return_lse=True, impl=impl)
        results.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    for got, want in zip(*results, strict=True):
        assert max_error(got, want) <= 1e-10
