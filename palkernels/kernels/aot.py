"""Compile every shipped tile ahead of time, without a GPU, and read what the compiler made of it.

    python -m palkernels.kernels.aot 90        one JSON object per tile

It must run in a process without TRITON_INTERPRET: the interpreter replaces the compiler when kernels are defined.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from palkernels.kernels import tiles
from palkernels.kernels.forward import lal_forward_kernel

# Shared memory one program may use, bytes.
SHARED_MEMORY = {80: 166_912, 90: 232_448}
TYPES = {2: "bf16", 4: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What one kernel variant uses on one architecture."""

    capability: int
    dtype: str
    head_dim: int
    features: str
    tile: tiles.Tile
    registers: int
    stack_bytes: int
    shared_bytes: int
    wgmma: int
    transposed_register_dots: int


def compile_forward(capability: int, element_size: int, head_dim: int, tile: tiles.Tile, *, features: str) -> Compiled:
    """Compile the forward kernel; ``features`` is "plain" or "all" (every optional tensor, softcap and a window)."""
    everything = features == "all"
    dtype = TYPES[element_size]
    constants: dict[str, object] = {
        "SCALE": head_dim**-0.5,
        "SOFTCAP": 50.0 if everything else None,
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_D": tiles.padded_head_dim(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "ACC": tl.float32,
    }
    for name in ("stride_qd", "stride_kd", "stride_vd", "stride_akd", "stride_avd", "stride_od"):
        constants[name] = 1
    optional = ("lengths_ptr", "index_ptr", "visible_ptr", "start_ptr", "end_ptr")
    if not everything:
        constants |= dict.fromkeys((*optional, "window"))
    signature, aligned = {}, []
    for name in lal_forward_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in optional:
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name == "lse_ptr" else f"*{dtype}"
            aligned.append(name)
        else:
            signature[name] = "i32"
            if name.startswith("stride") and "visible" not in name:
                aligned.append(name)
    position = {name: (index,) for index, name in enumerate(lal_forward_kernel.arg_names)}
    source = ASTSource(
        lal_forward_kernel,
        signature,
        {position[name]: value for name, value in constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(
        capability=capability,
        dtype=dtype,
        head_dim=head_dim,
        features=features,
        tile=tile,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        wgmma=kernel.asm["ptx"].count("wgmma.mma_async"),
        # Triton 3.4 to 3.7.0 miscompiles a dot whose left operand is a transposed register tile.
        transposed_register_dots=len(re.findall(r"tt\.trans .*: tensor<[^>]*, #mma", kernel.asm["ttgir"])),
    )


def compile_shipped(capability: int, element_sizes: tuple[int, ...] = (2, 4)) -> Iterator[Compiled]:
    """Every tile that :mod:`palkernels.kernels.tiles` can choose on this architecture, plain and with all features."""
    for element_size, head_dim, tile in tiles.shipped_forward_tiles(capability):
        if element_size in element_sizes:
            for features in ("plain", "all"):
                yield compile_forward(capability, element_size, head_dim, tile, features=features)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack per thread: spilled registers live there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text}")
    return int(found[1]), int(found[2])


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for compiled in compile_shipped(capability):
            print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
