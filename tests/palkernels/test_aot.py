"""Every shipped tile compiles for the GPUs it is meant for, and fits them. No GPU is needed."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from palkernels.kernels.aot import SHARED_MEMORY
from palkernels.kernels.tiles import FORWARD, forward_tile, shipped_forward_tiles

CAPABILITIES = sorted(FORWARD)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiled in fresh processes: in this one the interpreter has taken the compiler's place."""

    def compile_for(capability):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        done = subprocess.run(
            [sys.executable, "-m", "palkernels.kernels.aot", str(capability)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor() as pool:
        return dict(zip(CAPABILITIES, pool.map(compile_for, CAPABILITIES), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shipped_tile_is_compiled(compiled, capability):
    want = {(head_dim, tile.block_m, tile.block_n) for _, head_dim, tile in shipped_forward_tiles(capability)}
    rows = compiled[capability]
    assert {(row["head_dim"], row["tile"]["block_m"], row["tile"]["block_n"]) for row in rows} == want
    assert {row["features"] for row in rows} == {"plain", "all"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fits_shared_memory(compiled, capability):
    for row in compiled[capability]:
        assert 0 < row["shared_bytes"] <= SHARED_MEMORY[capability], row


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_does_not_spill(compiled, capability):
    """ptxas may keep up to 16 bytes of stack without spilling a tile; a spilled tile takes hundreds."""
    for row in compiled[capability]:
        assert row["stack_bytes"] <= 16, row


def test_the_small_table_fits_consumer_gpus(compiled):
    """Compute capabilities 8.6, 8.9 and 12.0 take the table of 8.0, and have 101,376 bytes."""
    assert forward_tile(120, 2, 256, 128) == forward_tile(80, 2, 256, 128)
    assert max(row["shared_bytes"] for row in compiled[80]) <= 101_376


def test_hopper_uses_its_tensor_cores(compiled):
    """A full tile of 64 rows or more is one warpgroup's wgmma; 16-bit inputs must reach it."""
    full = [row for row in compiled[90] if row["dtype"] == "bf16" and row["tile"]["block_m"] >= 64]
    assert full
    assert all(row["wgmma"] > 0 for row in full)


def test_no_transposed_register_operand(compiled):
    """Triton 3.4 to 3.7.0 miscompiles such dots."""
    for rows in compiled.values():
        assert all(row["transposed_register_dots"] == 0 for row in rows)
