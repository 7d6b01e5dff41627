"""Compile every shipped tile ahead of time, without a GPU, and read what the compiler made of it.

    python -m palkernels.kernels.aot 90 --dtypes bfloat16        one JSON object per kernel variant

The launches are the real ones, on tensors without memory. This needs a process of its own: it replaces Triton's GPU
driver, and TRITON_INTERPRET, which replaces the compiler when kernels are defined, must not be set.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from palkernels.arguments import FLOATS, Call, Projection
from palkernels.dispatch import MIN_EIGHT_BIT_CAPABILITY
from palkernels.dtypes import EIGHT_BITS
from palkernels.kernels import projection, tiles
from palkernels.kernels.backward import backward_launches
from palkernels.kernels.decode import decode_launch
from palkernels.kernels.forward import forward_launch
from palkernels.kernels.launch import INTERPRETED, Launch
from palkernels.kernels.statistics import empty_statistics

# Shared memory one program may use, bytes. Ampere's table also serves the consumer GPUs, which have the least.
SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# No option at all; padding, shared audio and the LSE's gradient; every option; padding, and audio in eight bits, which
# has no gradients. And the query heads per K/V head: a power of two, or 7, as Qwen2.5-7B has them.
GROUPS = {"none": 4, "padding": 7, "all": 4, "eight bits": 4}
FEATURES = ("none", "padding", "all")
LEAST_OF_EIGHT_BITS = 10 * MIN_EIGHT_BIT_CAPABILITY[0] + MIN_EIGHT_BIT_CAPABILITY[1]
# How models lay out (B, H, T, D) in memory: as their projections leave it, and as caches keep it.
LAYOUTS = ("BTHD", "BHTD")
HEAD_DIMS = tuple(sorted({head_dim for _, head_dim in tiles.TILES["forward"][80]}))


@dataclass(frozen=True)
class Compiled:
    """What one kernel variant uses on one architecture."""

    kernel: str
    gradients: str  # which of dK and dV the keys' gradient kernel computes; "" for the others
    capability: int
    dtype: str
    head_dim: int
    features: str
    tile: tiles.Tile
    registers: int
    stack_bytes: int  # registers that did not fit live there
    shared_bytes: int
    wgmma: int  # Hopper's matrix instructions
    async_copies: int
    register_moves: int  # between warps; of the Gluon kernel's alone
    narrow_loads: int  # loads of one or two bytes from memory, where rows of any dtype could be read by four and more
    transposed_register_dots: int
    serialised: str  # why ptxas carries out the wgmma one after another; "" where it does not


def compile_kernel(
    kernel: str, capability: int, dtype: torch.dtype, head_dim: int, tile: tiles.Tile, features: str
) -> list[Compiled]:
    """Compile one kernel; an entry per launch: above head dim 128 dK and dV take one each.

    The layouts of memory share what is compiled; one that compiled to code of its own would have an entry too.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET must not be set where kernels are compiled")
    driver.set_active(_Compiler(capability))
    compiled: list[Compiled] = []
    for layout in LAYOUTS:
        with tiles.use(**{kernel: tile}):
            launches = _launches(kernel, capability, dtype, head_dim, tile.block_m, features, layout)
        for gradients, launch in launches.items():
            used = _used(launch, kernel, gradients, capability, dtype, head_dim, features, tile)
            compiled += [] if used is None else [used]
    return compiled


def compile_gluon(dtype: torch.dtype, head_dim: int, features: str) -> list[Compiled]:
    """Compile the Gluon forward for compute capability 9.0; as :func:`compile_kernel`."""
    from palkernels.kernels.gluon.choice import LAYOUTS as TILES
    from palkernels.kernels.gluon.forward import gluon_forward_launch

    driver.set_active(_Compiler(90))
    compiled = []
    for layout in LAYOUTS:
        launch = gluon_forward_launch(*_call(dtype, head_dim, 256, features, layout))
        compiled.append(_used(launch, "gluon_forward", "", 90, dtype, head_dim, features, TILES[head_dim].tile))
    return [used for used in compiled if used is not None]


def shipped_variants(
    capability: int,
    dtypes: tuple[torch.dtype, ...],
    kernels: tuple[str, ...] = tiles.KERNELS,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    features: tuple[str, ...] = FEATURES,
) -> list[tuple[str, int, torch.dtype, int, tiles.Tile, str]]:
    """Arguments of :func:`compile_kernel` for every tile that :mod:`palkernels.kernels.tiles` can choose there."""
    return [
        (kernel, capability, dtype, head_dim, tile, option)
        for kernel in kernels
        for dtype in dtypes
        for option in features
        for element_size, head_dim, tile in tiles.shipped(kernel, tiles.architecture(capability), option == "all")
        if element_size == dtype.itemsize and head_dim in head_dims
        if option != "eight bits" or _has_eight_bits(kernel, capability, dtype)
    ]


def _has_eight_bits(kernel: str, capability: int, dtype: torch.dtype) -> bool:
    """Whether a kernel is compiled for audio in eight bits, too: not beside float32, where one tile spills for it."""
    return kernel in ("forward", "decode") and capability >= LEAST_OF_EIGHT_BITS and dtype.itemsize == 2


def compile_projection(capability: int, dtype: torch.dtype) -> list[dict[str, object]]:
    """Compile the kernels around audio_kv's products, at models' sizes and with every option; what each uses."""
    driver.set_active(_Compiler(capability))
    reports: list[dict[str, object]] = []
    for width, head_dim in ((2048, 64), (3072, 128), (8192, 256)):

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        states, keys, turn = floats(8, 1504, width), floats(8, 1504, 8, head_dim), floats(8, 1504, head_dim)
        weight, bias = floats(8 * head_dim, width), floats(8 * head_dim)
        layer = Projection(
            states, floats(width), weight, weight, bias, bias, floats(head_dim), turn, turn,
            num_kv_heads=8, eps=1e-6, norm_offset=1.0,
        )  # fmt: skip
        rows, sums = layer.flat_states, torch.empty(1, dtype=torch.float32, device="meta")
        launches = {
            "normalise": projection.normalise_launch(layer, layer.norm_weight, rows),
            "normalise_gradient": projection.normalise_gradient_launch(rows, layer, rows, sums),
            "finish_keys": projection.finish_keys_launch(keys, layer),
            "finish_gradient": projection.finish_gradient_launch(keys, keys, layer, keys, sums),
        }
        for kernel, launch in launches.items():
            binary, log = _compile(launch)
            registers, stack = resources(log)
            reports.append(
                {"kernel": kernel, "capability": capability, "dtype": str(dtype).removeprefix("torch."),
                 "width": width, "head_dim": head_dim, "registers": registers, "stack_bytes": stack,
                 "shared_bytes": binary.metadata.shared}
            )  # fmt: skip
    return reports


def _used(
    launch: Launch, kernel: str, gradients: str, capability: int, dtype: torch.dtype, head_dim: int, features: str,
    tile: tiles.Tile,
) -> Compiled | None:  # fmt: skip
    """What a launch uses, compiled; None where it is compiled already, for the other layout."""
    binary, log = _compile(launch)
    if not log:
        return None
    registers, stack = resources(log)
    ptx = binary.asm["ptx"]
    return Compiled(
        kernel=kernel,
        gradients=gradients,
        capability=capability,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        features=features,
        tile=tile,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=binary.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        async_copies=len(re.findall(r"cp\.async\.c[ga]|cp\.async\.bulk\.tensor", ptx)),
        register_moves=ptx.count("setmaxnreg"),
        narrow_loads=len(re.findall(r"ld\.global\S*\.[bu](?:8|16)\b", ptx)),
        transposed_register_dots=transposed_register_dots(binary.asm["ttgir"]),
        serialised=serialised(log),
    )


def _call(dtype: torch.dtype, head_dim: int, num_rows: int, features: str, layout: str) -> tuple[Call, Tensor, Tensor]:
    """A call at the strides of a layout, its output and its LSE."""
    batch, kv_heads, num_keys, num_audio = 8, 8, 256, 1504
    group = GROUPS[features]
    num_queries = max(num_rows // group, 1)
    padded = features != "none"

    def floats(heads: int, tokens: int, dtype: torch.dtype = dtype) -> Tensor:
        if layout == "BHTD":
            return torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device="meta")
        return torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    def integers(*shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.int64, device="meta") if padded else None

    query = floats(kv_heads * group, num_queries)
    audio_dtype, scale = dtype, None
    if features == "eight bits":
        audio_dtype, scale = EIGHT_BITS, torch.empty(batch, kv_heads, dtype=torch.float32, device="meta")
    call = Call(
        query,
        floats(kv_heads, num_keys),
        floats(kv_heads, num_keys),
        floats(kv_heads, num_audio, audio_dtype),
        floats(kv_heads, num_audio, audio_dtype),
        audio_lengths=integers(batch),
        audio_index=integers(batch),
        audio_visible_from=integers(batch, num_audio) if features == "all" else None,
        text_start=integers(batch),
        text_end=integers(batch),
        scale=head_dim**-0.5,
        softcap=50.0 if features == "all" else None,
        window=100 if features == "all" else None,
        audio_key_scale=scale,
        audio_value_scale=scale,
    )
    out = torch.empty_like(query)
    return call, out, torch.empty(query.shape[:3], dtype=torch.float32, device="meta")


def _launches(
    kernel: str, capability: int, dtype: torch.dtype, head_dim: int, num_rows: int, features: str, layout: str
) -> dict[str, Launch]:
    """Launches of the kernel at the strides of a layout, for the gradients of all five tensors in backward."""
    call, out, lse = _call(dtype, head_dim, num_rows, features, layout)
    if kernel == "forward":
        return {"": forward_launch(call, out, lse, capability=None)}
    if kernel == "decode":
        return {"": decode_launch(call, out, lse, capability=None)}
    gradients: dict[str, Tensor | None] = {name: torch.empty_like(getattr(call, name)) for name in FLOATS}
    dlse = lse if features != "none" else None
    statistics = empty_statistics(call, lse, capability)
    query_launch, *key_launches = backward_launches(call, out, lse, out, dlse, statistics, gradients, capability)
    if kernel == "query_gradient":
        return {"": query_launch}
    return dict(zip(("dK", "dV") if len(key_launches) == 2 else ("dK dV",), key_launches, strict=True))


class _Compiler:
    """Stands in for Triton's GPU driver: it says what to compile for, and cannot launch.

    Each is another device, for which Triton, which keeps what it has compiled by device, has compiled nothing yet.
    """

    _count = itertools.count()

    def __init__(self, capability: int):
        self.capability = capability
        self.device = next(self._count)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def transposed_register_dots(ttgir: str) -> int:
    """How often a product's register tile is transposed: Triton 3.4 to 3.7 miscompiles that on Hopper."""
    return len(re.findall(r"tt\.trans .*: tensor<[^>]*, #mma", ttgir))


def _compile(launch: Launch) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas said about it; nothing where this device has it already.

    Triton's cache on disk keeps no log: it is not used.
    """
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        binary = launch.compile()
    return binary, log.getvalue()


def resources(log: str) -> tuple[int, int]:
    """Registers, and bytes of stack, of a thread, from the log of ``ptxas -v``."""
    registers, stack = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes stack frame", log)
    if registers is None or stack is None:
        raise RuntimeError(f"ptxas must say what a kernel uses, got {log!r}")
    return int(registers[1]), int(stack[1])


def serialised(log: str) -> str:
    """Why ptxas serialises a kernel's wgmma, by its log (warnings C7510 and on); "" where it does not."""
    reasons = re.findall(r"^.*(?:\(C75\d\d\)|wgmma.* serialized).*$", log, re.MULTILINE)
    return "; ".join(reason.removeprefix("ptxas info    : ") for reason in reasons)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every shipped tile; one JSON object per kernel variant.")
    parser.add_argument("capabilities", type=int, nargs="+", help="80, 90 or 100")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--kernels", nargs="+", choices=tiles.KERNELS, default=tiles.KERNELS)
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--features", nargs="+", choices=GROUPS, default=FEATURES)
    parser.add_argument("--projection", action="store_true", help="the kernels of audio_kv instead")
    parser.add_argument("--gluon", action="store_true", help="the Gluon forward instead, for 90")
    arguments = parser.parse_args()
    for capability in arguments.capabilities:
        dtypes = tuple(DTYPES[name] for name in arguments.dtypes)
        if arguments.gluon:
            for dtype, head_dim, features in itertools.product(dtypes, (64, 128), ("none", "padding")):
                for compiled in compile_gluon(dtype, head_dim, features):
                    print(json.dumps(asdict(compiled)), flush=True)
            continue
        if arguments.projection:
            for dtype in dtypes:
                for report in compile_projection(capability, dtype):
                    print(json.dumps(report), flush=True)
            continue
        chosen = (tuple(x) for x in (arguments.kernels, arguments.head_dims, arguments.features))
        for variant in shipped_variants(capability, dtypes, *chosen):
            for compiled in compile_kernel(*variant):
                print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
