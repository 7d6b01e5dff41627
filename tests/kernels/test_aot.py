"""Shipped tiles compile for the GPUs they are meant for, and fit them. No GPU is needed. Which: `support.ahead`."""

import itertools
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from support import thorough
from support.ahead import CAPABILITIES, DTYPES, EVERYTHING, OPTIONS, variants
from support.compiled import compile_ahead, run_compiling

from palkernels.kernels import aot, tiles
from palkernels.kernels.aot import SHARED_MEMORY, shipped_variants

SUPPORT = Path(__file__).parents[1] / "lib" / "support"
# Bytes per thread that ptxas may keep on the stack: a few scalars that it parks outside the inner loops. A tile that
# spills its accumulators takes hundreds.
STACK = {80: 32, 90: 0, 100: 16}
# Chosen by their time on an H200 with Triton 3.6 (bench/LOG.md), though they spill; how much depends on the ptxas that
# Triton brings. Triton's series -> (kernel, head dim, register limit) -> bytes.
MEASURED = {
    "3.6": {("key_gradient", 64, 168): 16, ("key_gradient", 128, None): 120},  # ptxas 12.8
    "3.8": {("key_gradient", 64, 168): 112, ("key_gradient", 128, None): 176},  # 12.9
    "3.9": {("key_gradient", 64, 168): 120, ("key_gradient", 128, None): 8, ("forward", 128, 168): 16},  # 13.4
}
GLUON = {"3.9": 48}  # a few scalars, as above
DECODE = {"3.6": {128: 16}}  # by head dim, as above
SERIES = ".".join(version("triton").split(".")[:2])
ODD_GROUP = 8  # more of it where rows divide into groups of 7, as with padding


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    (rows,) = compile_ahead([("support.ahead", *CAPABILITIES)], tmp_path_factory.mktemp("triton"))
    return {capability: [row for row in rows if row["capability"] == capability] for capability in CAPABILITIES}


def identity(row):
    tile = tuple(row["tile"].values())
    return row["kernel"], row["dtype"], row["head_dim"], row["features"], tile


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_is_tried_is_compiled(compiled, capability):
    want = {
        (kernel, str(dtype).removeprefix("torch."), head_dim, features, tuple(vars(tile).values()))
        for kernel, _, dtype, head_dim, tile, features in variants(capability)
    }
    assert {identity(row) for row in compiled[capability]} == want


def test_every_shipped_tile_is_tried():
    """In any dtype, of any two of the kernel, the head dim, and the GPU with its options; or of all three, and of any
    rows with padding."""
    sides = [set(), set()]
    for side, found in zip(sides, (variants, lambda x: shipped_variants(x, DTYPES, features=OPTIONS[x])), strict=True):
        for capability in CAPABILITIES:
            for kernel, _, dtype, head_dim, tile, features in found(capability):
                rows = tile.block_m * (features == "padding")
                whole = ((kernel, head_dim, (capability, features), rows),)
                pairs = itertools.combinations((kernel, head_dim, (capability, features)), 2)
                side |= {(dtype, each) for each in (whole if thorough.EVERYTHING or EVERYTHING else pairs)}
    tried, shipped = sides
    assert tried == shipped


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_what_is_chosen_is_shipped(capability, kernel):
    """Every tile that a launch can take is among those compiled: of any head dim, options, rows in decoding."""
    shipped = {
        (dtype, head_dim, tile)
        for name, _, dtype, head_dim, tile, _ in shipped_variants(capability, (torch.bfloat16, torch.float32))
        if name == kernel
    }
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (1, 32, 64, 80, 96, 128, 256):
            for intricate in (False, True):
                tile = tiles.choose(kernel, capability, dtype, head_dim, intricate)
                for rows in (1, 16, 17, 32, 33, 100_000) if kernel == "decode" else ():
                    tile = tiles.choose(kernel, capability, dtype, head_dim, intricate, rows)
                    assert (dtype, tiles.padded_head_dim(head_dim), tile) in shipped
                assert (dtype, tiles.padded_head_dim(head_dim), tile) in shipped


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_warps_split_the_keys_of_few_rows_alone(capability):
    for rows, splits in ((1, True), (16, True), (17, False), (None, False)):
        for head_dim in (32, 64, 80, 128):
            for intricate in (False, True):
                tile = tiles.choose("decode", capability, torch.float16, head_dim, intricate, rows)
                assert tile.splits_keys == splits
        assert not tiles.choose("decode", capability, torch.float32, 64, False, rows).splits_keys
        for head_dim in (1, 40, 72, 100):  # their loads are masked
            assert not tiles.choose("decode", capability, torch.float16, head_dim, False, rows).splits_keys


def test_warps_that_split_keys_have_enough_of_them():
    assert tiles.Tile(16, 64, 4, 1, splits_keys=True).sub_blocks == 4
    assert tiles.Tile(16, 64, 4, 1).sub_blocks == 1
    with pytest.raises(ValueError, match="block_n must be at least 16 for each of 8 warps that split it, got 64"):
        tiles.Tile(16, 64, 8, 1, splits_keys=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fits_shared_memory(compiled, capability):
    for row in compiled[capability]:
        assert 0 < row["shared_bytes"] <= SHARED_MEMORY[capability], row


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_does_not_spill(compiled, capability):
    for row in compiled[capability]:
        odd = ODD_GROUP if row["features"] == "padding" else 0
        allowed = STACK[capability] + odd
        if capability == 90 and row["dtype"] != "float32" and row["features"] != "all":
            measured = MEASURED.get(SERIES, MEASURED["3.9"])
            allowed = measured.get((row["kernel"], row["head_dim"], row["tile"]["max_registers"]), allowed)
        if row["kernel"] == "decode":
            allowed = max(allowed, DECODE.get(SERIES, {}).get(row["head_dim"], 0))
        assert row["stack_bytes"] <= allowed, row


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_keeps_to_its_register_limit(compiled, capability):
    for row in compiled[capability]:
        assert 0 < row["registers"] <= (row["tile"]["max_registers"] or 255), row


@pytest.mark.slow
def test_hopper_uses_its_tensor_cores(compiled):
    """A warpgroup's wgmma takes 64 rows: of queries, or of keys where those are the held side."""
    held = dict.fromkeys(tiles.KERNELS, "block_m") | {"key_gradient": "block_n"}
    full = [row for row in compiled[90] if row["dtype"] != "float32" and row["tile"][held[row["kernel"]]] >= 64]
    assert {row["kernel"] for row in full} == set(tiles.KERNELS)
    assert all(row["wgmma"] > 0 for row in full)
    # Only decoding has smaller tiles: a few rows are no work for it.
    assert {row["kernel"] for row in compiled[90] if row["dtype"] != "float32" and row not in full} == {"decode"}


@pytest.mark.slow
def test_no_products_are_serialised(compiled):
    """ptxas serialises wgmma where it cannot keep several of them in flight, and the kernel then waits for each."""
    assert [row for rows in compiled.values() for row in rows if row["serialised"]] == []


LOG = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function 'k'
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    56 bytes stack frame, 76 bytes spill stores, 80 bytes spill loads
ptxas info    : Used 121 registers, used 1 barriers
"""


def test_the_log_of_ptxas_is_read():
    assert aot.resources(LOG) == (121, 56)
    reason, _, rest = LOG.partition("\n")
    assert aot.serialised(LOG) == reason.removeprefix("ptxas info    : ")
    assert aot.serialised(rest) == ""
    assert aot.serialised(LOG.replace("(C7515)", "(C7510)")).startswith("(C7510)")
    assert aot.serialised(LOG.replace("(C7515) ", "")).startswith("Potential")
    with pytest.raises(RuntimeError, match="ptxas must say what a kernel uses, got 'nothing'"):
        aot.resources("nothing")


@pytest.mark.slow
def test_the_kernels_of_audio_kv(tmp_path):
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    (rows,) = compile_ahead([("palkernels.kernels.aot", *CAPABILITIES, "--projection", "--dtypes", *names)], tmp_path)
    assert len(rows) == len(CAPABILITIES) * len(DTYPES) * 3 * 4
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_MEMORY[row["capability"]], row


@pytest.mark.slow
def test_the_gluon_forward(tmp_path):
    """Its warps share the registers out, and what they hold there fits."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES if dtype != torch.float32]
    (rows,) = compile_ahead([("palkernels.kernels.aot", 90, "--gluon", "--dtypes", *names)], tmp_path)
    assert len(rows) == len(names) * 2 * 2
    for row in rows:
        assert row["serialised"] == "", row
        assert row["stack_bytes"] <= GLUON.get(SERIES, 0), row
        assert row["shared_bytes"] <= SHARED_MEMORY[90], row
        assert min(row["wgmma"], row["async_copies"], row["register_moves"]) > 0, row


def test_consumer_gpus_take_the_table_that_fits_them():
    """Compute capabilities 8.6, 8.9 and 12.0 have 101,376 bytes of shared memory."""
    assert SHARED_MEMORY[80] == 101_376
    assert [tiles.architecture(x) for x in (80, 86, 89, 90, 100, 103, 120)] == [80, 80, 80, 90, 100, 100, 80]


@pytest.mark.slow
def test_loads_are_asynchronous(compiled):
    """Tiles with two or more stages copy ahead of the products."""
    for rows in compiled.values():
        pipelined = [row for row in rows if row["tile"]["num_stages"] > 1]
        assert pipelined
        assert all(row["async_copies"] > 0 for row in pipelined)


@pytest.mark.slow
def test_loads_are_wide(compiled):
    """Eight bits too are loaded by four bytes and more."""
    assert "eight bits" in {row["features"] for row in compiled[90]}
    assert [row for rows in compiled.values() for row in rows if row["narrow_loads"]] == []


@pytest.mark.slow
def test_no_transposed_register_operand(compiled):
    for rows in compiled.values():
        assert all(row["transposed_register_dots"] == 0 for row in rows)


@pytest.mark.slow
def test_a_transposed_register_operand_is_found(tmp_path):
    assert run_compiling([SUPPORT / "transposed.py"], tmp_path) == ["1"]
