"""Which tile each launch uses. Chosen by reasoning over registers and shared memory, not by autotuning.

A program holds ``block_m`` packed query rows (all heads of a group) and walks over keys in steps of ``block_n``.
The tables are by compute capability, head dim (rounded up to a power of two) and bytes per element.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

MIN_BLOCK = 16  # the smallest side a tensor-core product takes


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# float32 products take the plain arithmetic units (IEEE, no TF32): small tiles, so that registers do not spill.
_FLOAT32 = {
    (4, 16): Tile(64, 32, 4, 2),
    (4, 32): Tile(32, 32, 4, 2),
    (4, 64): Tile(32, 32, 8, 2),
    (4, 128): Tile(32, 16, 8, 1),
    (4, 256): Tile(32, 16, 8, 1),
}
# capability -> (bytes per element, padded head dim) -> tile
FORWARD: dict[int, dict[tuple[int, int], Tile]] = {
    90: {
        (2, 16): Tile(128, 64, 8, 3),
        (2, 32): Tile(128, 64, 8, 3),
        (2, 64): Tile(128, 64, 8, 3),
        (2, 128): Tile(64, 64, 4, 2),
        (2, 256): Tile(64, 64, 8, 2),
        **_FLOAT32,
    },
    80: {
        (2, 16): Tile(128, 64, 8, 3),
        (2, 32): Tile(128, 64, 8, 3),
        (2, 64): Tile(128, 64, 8, 3),
        (2, 128): Tile(64, 64, 4, 2),
        (2, 256): Tile(64, 32, 8, 2),
        **_FLOAT32,
    },
}
# Blocks as large as the interpreter's speed wants, small enough that tests cross several of them.
INTERPRETER = Tile(32, 32, 4, 1)

_override: ContextVar[Tile | None] = ContextVar("palkernels_tile", default=None)


@contextmanager
def use(tile: Tile) -> Iterator[None]:
    """Within the context every attention launch uses this tile."""
    token = _override.set(tile)
    try:
        yield
    finally:
        _override.reset(token)


def capability(device: torch.device) -> int:
    """Compute capability as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def padded_head_dim(head_dim: int) -> int:
    return max(MIN_BLOCK, 1 << (head_dim - 1).bit_length())


def forward_tile(capability: int | None, element_size: int, head_dim: int, num_rows: int) -> Tile:
    """The forward tile for ``num_rows`` packed query rows; ``capability`` as 90 for 9.0, None in the interpreter."""
    chosen = _override.get()
    if chosen is not None:
        return chosen
    if capability is None:
        return INTERPRETER
    # Consumer GPUs, 12.0 among them, have the small shared memory that the Ampere table keeps to.
    table = FORWARD[90 if 90 <= capability < 110 else 80]
    return _shrink(table[element_size, padded_head_dim(head_dim)], num_rows)


def _shrink(tile: Tile, num_rows: int) -> Tile:
    """Do not compute on rows that are not there: decoding packs only Hq / Hkv rows."""
    block_m = max(MIN_BLOCK, 1 << (num_rows - 1).bit_length()) if num_rows > 0 else MIN_BLOCK
    if block_m >= tile.block_m:
        return tile
    return replace(tile, block_m=block_m, num_warps=min(tile.num_warps, 4))


def shipped_forward_tiles(capability: int) -> list[tuple[int, int, Tile]]:
    """Every (element size, padded head dim, tile) that :func:`forward_tile` can choose there."""
    found = {
        (element_size, head_dim, _shrink(tile, rows))
        for (element_size, head_dim), tile in FORWARD[capability].items()
        for rows in (16, 32, 64, 128)
    }
    return sorted(found, key=repr)
