"""Which tile each launch uses. Chosen by reasoning over registers and shared memory, not by autotuning.

The tables are by kernel, compute capability, bytes per element and head dim (rounded up to a power of two).
``block_m`` counts packed query rows (all heads of a group), ``block_n`` keys. Forward and the queries' gradient hold a
block of rows and walk over keys; the keys' gradient holds a block of keys and walks over rows. Decoding takes the
smallest ``block_m`` that holds its rows, up to the table's, and for few rows a tile of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

KERNELS = ("forward", "decode", "query_gradient", "key_gradient")


MIN_BLOCK, MAX_BLOCK = 16, 1024  # tensor cores take no less; offsets are checked for no more


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int  # blocks in flight between memory and shared memory
    max_registers: int | None = None  # per thread, where fewer let another program share the SM
    # Decoding: each warp takes a sub-block of a block's keys, instead of all warps sharing it.
    splits_keys: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if not MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from {MIN_BLOCK} to {MAX_BLOCK}, got {size}")
        if self.block_n < MIN_BLOCK * self.sub_blocks:
            wanted = f"at least {MIN_BLOCK} for each of {self.num_warps} warps that split it"
            raise ValueError(f"block_n must be {wanted}, got {self.block_n}")

    @property
    def sub_blocks(self) -> int:
        return self.num_warps if self.splits_keys else 1


# float32 products take the plain arithmetic units (IEEE, no TF32): small tiles, so that registers do not spill.
_FLOAT32_FORWARD = {
    (4, 32): Tile(32, 32, 4, 2),
    (4, 64): Tile(32, 32, 8, 2),
    (4, 128): Tile(32, 16, 8, 2),
    (4, 256): Tile(16, 16, 8, 2),
}
_FLOAT32_DECODE = {
    (4, 32): Tile(32, 32, 8, 2, max_registers=255),
    (4, 64): Tile(32, 32, 8, 2, max_registers=255),
    (4, 128): Tile(32, 16, 8, 2, max_registers=255),
    (4, 256): Tile(16, 16, 8, 2, max_registers=255),
}
_FLOAT32_QUERY_GRADIENT = _FLOAT32_FORWARD | {
    (4, 128): Tile(16, 16, 8, 2),
    (4, 256): Tile(16, 16, 8, 2, max_registers=168),
}
_FLOAT32_KEY_GRADIENT = _FLOAT32_FORWARD | {
    (4, 32): Tile(32, 32, 8, 2),
    (4, 128): Tile(16, 16, 8, 1),
    (4, 256): Tile(16, 16, 8, 1),
}
# kernel -> capability -> (bytes per element, padded head dim) -> tile
TILES: dict[str, dict[int, dict[tuple[int, int], Tile]]] = {
    "forward": {
        90: {
            (2, 32): Tile(128, 64, 8, 3),
            (2, 64): Tile(128, 64, 8, 3, max_registers=128),  # two programs per SM
            (2, 128): Tile(64, 32, 4, 3, max_registers=168),  # three
            (2, 256): Tile(64, 32, 8, 2),
            **_FLOAT32_FORWARD,
            # Left to itself ptxas spills here for the sake of more programs.
            (4, 32): Tile(32, 32, 4, 2, max_registers=255),
            (4, 128): Tile(32, 16, 8, 2, max_registers=128),
        },
        80: {
            (2, 32): Tile(128, 64, 8, 3),
            (2, 64): Tile(128, 64, 8, 3),
            (2, 128): Tile(64, 32, 4, 3),
            (2, 256): Tile(64, 32, 8, 2),
            **_FLOAT32_FORWARD,
        },
    },
    # Bound by memory: what counts is bytes in flight, stages times programs per SM. Without a limit of registers ptxas
    # spills for the sake of more programs.
    "decode": {
        90: {
            (2, 32): Tile(64, 64, 4, 3, max_registers=255),
            (2, 64): Tile(64, 64, 4, 3, max_registers=255),
            (2, 128): Tile(64, 64, 4, 3, max_registers=255),
            (2, 256): Tile(32, 32, 8, 3, max_registers=255),
            **_FLOAT32_DECODE,
        },
        80: {
            (2, 32): Tile(64, 64, 4, 3, max_registers=255),
            (2, 64): Tile(64, 64, 4, 3, max_registers=255),
            (2, 128): Tile(64, 32, 4, 3, max_registers=255),
            (2, 256): Tile(32, 32, 8, 2, max_registers=255),
            **_FLOAT32_DECODE,
        },
    },
    "query_gradient": {
        90: {
            (2, 32): Tile(128, 64, 8, 3),
            (2, 64): Tile(128, 64, 8, 3, max_registers=128),
            (2, 128): Tile(64, 32, 4, 3),
            (2, 256): Tile(64, 16, 8, 2),
            **_FLOAT32_QUERY_GRADIENT,
        },
        80: {
            (2, 32): Tile(128, 64, 8, 2),
            (2, 64): Tile(64, 32, 4, 2),
            (2, 128): Tile(64, 64, 8, 2),
            (2, 256): Tile(64, 16, 8, 2),
            **_FLOAT32_QUERY_GRADIENT,
        },
    },
    "key_gradient": {
        90: {
            (2, 32): Tile(32, 64, 4, 2),
            (2, 64): Tile(64, 64, 4, 1, max_registers=168),
            (2, 128): Tile(64, 64, 4, 1),
            (2, 256): Tile(16, 64, 8, 2),
            **_FLOAT32_KEY_GRADIENT,
            (4, 256): Tile(16, 16, 8, 1, max_registers=128),
        },
        80: {
            (2, 32): Tile(32, 64, 4, 2),
            (2, 64): Tile(32, 64, 4, 1),
            (2, 128): Tile(32, 64, 8, 2),
            (2, 256): Tile(16, 32, 8, 2),
            **_FLOAT32_KEY_GRADIENT,
        },
    },
}
# Blackwell's data centre GPUs take Hopper's tiles, but for those that would spill there.
_BLACKWELL = {
    "forward": {(2, 64): Tile(128, 32, 8, 3, max_registers=128)},
    "decode": {
        (2, 64): Tile(64, 64, 8, 3, max_registers=255),
        (2, 128): Tile(64, 32, 8, 3, max_registers=255),
    },
    "query_gradient": {
        (2, 64): Tile(128, 32, 8, 3, max_registers=128),
        (2, 128): Tile(64, 32, 4, 3, max_registers=168),
    },
    "key_gradient": {
        (2, 32): Tile(32, 64, 8, 2),
        (2, 64): Tile(32, 64, 4, 1),
        (2, 128): Tile(16, 64, 8, 2),
        (2, 256): Tile(16, 32, 8, 2),
    },
}
for _kernel, _tables in TILES.items():
    _tables[100] = _tables[90] | _BLACKWELL.get(_kernel, {})

# For intricate calls (see Call.is_intricate), where the entry above would spill.
INTRICATE: dict[str, dict[int, dict[tuple[int, int], Tile]]] = {
    "forward": {90: {(2, 64): Tile(128, 32, 8, 3, max_registers=128)}},
    "decode": {
        capability: {
            (2, 32): Tile(64, 32, 8, 3, max_registers=255),
            (2, 64): Tile(64, 64, 8, 3, max_registers=255),
            (2, 128): Tile(64, 32, 8, 3, max_registers=255),
        }
        for capability in (80, 90, 100)
    },
    "query_gradient": {90: {(2, 64): Tile(128, 32, 8, 3, max_registers=128)}},
    "key_gradient": {
        90: {(2, 64): Tile(64, 64, 4, 1), (2, 128): Tile(16, 128, 8, 2), (4, 64): Tile(16, 32, 8, 2)},
    },
}
INTRICATE["decode"][100][4, 64] = Tile(32, 16, 8, 2, max_registers=255)  # of these GPUs alone

# For decoding up to MIN_BLOCK packed rows: as many as tensor cores take at once, which several warps can share in keys
# alone. Splitting these, they exchange nothing from block to block; above 128 columns the outputs would not fit.
FEW_ROWS = {
    (2, 32): Tile(MIN_BLOCK, 64, 4, 3, max_registers=255, splits_keys=True),
    (2, 64): Tile(MIN_BLOCK, 64, 4, 3, max_registers=168, splits_keys=True),  # three programs per SM
    (2, 128): Tile(MIN_BLOCK, 64, 4, 3, max_registers=255, splits_keys=True),
}
FEW_ROWS_COLUMNS = 16  # of which head dims must be multiples: masked loads of others spill 150 bytes and more
INTRICATE_FEW_ROWS = {(2, 64): Tile(MIN_BLOCK, 64, 4, 3, max_registers=255, splits_keys=True)}
# Blocks as large as the interpreter's speed wants, small enough that tests cross several of them.
INTERPRETER = Tile(32, 32, 4, 1)
INTERPRETER_FEW_ROWS = Tile(16, 32, 2, 1, splits_keys=True)

overrides: dict[str, Tile] = {}  # by kernel name, while a context of :func:`use` is open


@contextmanager
def use(every: Tile | None = None, /, **tiles: Tile) -> Iterator[None]:
    """Within the context launches use these tiles, by kernel name (see ``KERNELS``), or one for every kernel.

    It holds for the whole process: autograd runs backward kernels from threads of its own.
    """
    unknown = [name for name in tiles if name not in KERNELS]
    if unknown:
        raise ValueError(f"kernels must be among {', '.join(KERNELS)}, got {', '.join(unknown)}")
    saved = dict(overrides)
    overrides.update(tiles if every is None else dict.fromkeys(KERNELS, every) | tiles)
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(saved)


def capability(device: torch.device) -> int:
    """Compute capability as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(capability: int) -> int:
    """The table for a GPU. Consumer GPUs, 12.0 among them, have the small shared memory that Ampere's keeps to."""
    if 100 <= capability < 120:
        return 100
    return 90 if 90 <= capability < 100 else 80


def padded_head_dim(head_dim: int) -> int:
    """Columns that a tile holds."""
    return max(32, 1 << (head_dim - 1).bit_length())


def splits_key_gradient(head_dim: int) -> bool:
    """Whether dK and dV take a launch each: in one, their accumulators would not fit the registers."""
    return padded_head_dim(head_dim) > 128


def choose(
    kernel: str, capability: int | None, dtype: torch.dtype, head_dim: int, intricate: bool, num_rows: int | None = None
) -> Tile:
    """The tile of a launch. ``capability`` is 90 for 9.0, None in the interpreter; ``num_rows`` the packed rows that
    decoding wants in a tile, None for any number."""
    few = num_rows is not None and num_rows <= MIN_BLOCK and head_dim % FEW_ROWS_COLUMNS == 0
    if kernel in overrides:
        tile = overrides[kernel]
    elif capability is None:
        tile = INTERPRETER_FEW_ROWS if few else INTERPRETER
    else:
        about = dtype.itemsize, padded_head_dim(head_dim), intricate
        tile = _entry(kernel, architecture(capability), *about)
        tile = _few_rows(tile, *about) if few else tile
    return tile if num_rows is None else with_rows(tile, num_rows)


def with_rows(tile: Tile, num_rows: int) -> Tile:
    """The tile with a smaller ``block_m``, where fewer rows are packed."""
    return replace(tile, block_m=min(tile.block_m, max(MIN_BLOCK, 1 << (num_rows - 1).bit_length())))


def _entry(kernel: str, architecture: int, element_size: int, head_dim: int, intricate: bool) -> Tile:
    tile = TILES[kernel][architecture][element_size, head_dim]
    if intricate:
        tile = INTRICATE.get(kernel, {}).get(architecture, {}).get((element_size, head_dim), tile)
    return tile


def _few_rows(tile: Tile, element_size: int, head_dim: int, intricate: bool) -> Tile:
    tile = FEW_ROWS.get((element_size, head_dim), tile)
    return INTRICATE_FEW_ROWS.get((element_size, head_dim), tile) if intricate else tile


def shipped(kernel: str, architecture: int, intricate: bool) -> list[tuple[int, int, Tile]]:
    """Every (bytes per element, padded head dim, tile) that a launch of a kernel can take on an architecture."""
    tiles = []
    for element_size, head_dim in sorted(TILES[kernel][architecture]):
        tile = _entry(kernel, architecture, element_size, head_dim, intricate)
        found = [tile]
        if kernel == "decode":
            few = _few_rows(tile, element_size, head_dim, intricate)
            found = [with_rows(few, MIN_BLOCK), *(with_rows(tile, size) for size in (MIN_BLOCK, 32, 64))]
        tiles += [(element_size, head_dim, x) for x in dict.fromkeys(found)]
    return tiles
