"""Which tiles a sweep tries, and what the compiler makes of each: ahead of time, in processes of their own.

python -m palkernels.bench.kernels.candidates KERNEL ARCH DTYPE HEAD_DIM < TILES > ROWS      one JSON object a line
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

from palkernels.bench.errors import one_line
from palkernels.kernels import aot, tiles

__all__ = ["Row", "candidates", "compile_all"]

Row = dict[str, Any]
FEATURES = "none"  # as the microbenchmark calls the kernels
REGISTERS = (None, 128, 168, 255)


def candidates(tile: tiles.Tile, fixed: tuple[str, ...] = ()) -> list[tiles.Tile]:
    """Return a tile, and all that differ from it in one property or two: half or twice the rows or keys, the other
    number of warps, a stage more or less, another limit of registers, keys that warps do not split. Properties in
    `fixed` stay."""
    others: dict[str, tuple[Any, ...]] = {
        "block_m": (tile.block_m // 2, 2 * tile.block_m),
        "block_n": (tile.block_n // 2, 2 * tile.block_n),
        "num_warps": (12 - tile.num_warps,) if tile.num_warps in (4, 8) else (4, 8),
        "num_stages": tuple(x for x in (tile.num_stages - 1, tile.num_stages + 1) if x > 0),
        "max_registers": tuple(x for x in REGISTERS if x != tile.max_registers),
        "splits_keys": (False,) if tile.splits_keys else (),
    }
    singles = [{name: value} for name, values in others.items() if name not in fixed for value in values]
    pairs = [a | b for a, b in combinations(singles, 2) if a.keys() != b.keys()]
    found = [tile]
    for change in [*singles, *pairs]:
        sizes = [change.get(name, getattr(tile, name)) for name in ("block_m", "block_n")]
        split = change.get("num_warps", tile.num_warps) if change.get("splits_keys", tile.splits_keys) else 1
        if all(tiles.MIN_BLOCK <= size <= 256 for size in (sizes[0], sizes[1] // split)):  # larger ones never fit
            found.append(replace(tile, **change))
    return found


def compile_all(
    kernel: str, arch: int, dtype: str, head_dim: int, chosen: list[tiles.Tile], processes: int
) -> Iterator[tuple[tiles.Tile, list[Row]]]:
    """Yield for each tile what each launch of the kernel uses, or one row {"failed": reason}; in the order given."""
    parts = [chosen[first::processes] for first in range(processes)]

    def run(part: list[tiles.Tile]) -> list[list[Row]]:
        if not part:
            return []
        command = [sys.executable, "-P", "-m", __name__, kernel, str(arch), dtype, str(head_dim)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        given = json.dumps([asdict(tile) for tile in part])
        done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the process that compiles must end with exit code 0, got: {done.stderr[-2000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(processes) as pool:
        rows = list(pool.map(run, parts))
    for number, tile in enumerate(chosen):
        yield tile, rows[number % processes][number // processes]


def _compile(kernel: str, arch: int, dtype: str, head_dim: int, tile: tiles.Tile) -> list[Row]:
    try:
        variants = aot.compile_kernel(kernel, arch, aot.DTYPES[dtype], head_dim, tile, FEATURES)
    except Exception as error:  # whatever Triton and ptxas raise on a tile that cannot be
        return [{"failed": one_line(error)[:200]}]
    return [asdict(compiled) for compiled in variants]


def main() -> None:
    kernel, arch, dtype, head_dim = sys.argv[1:]
    written = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Triton prints the code that it cannot compile
    for given in json.load(sys.stdin):
        rows = _compile(kernel, int(arch), dtype, int(head_dim), tiles.Tile(**given))
        print(json.dumps(rows), file=written, flush=True)


if __name__ == "__main__":
    main()
