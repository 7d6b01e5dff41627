"""Which forwards take the Gluon kernel rather than the Triton kernel, where it is switched on. Needs no triton."""

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch

from palkernels.arguments import Call
from palkernels.kernels import tiles

# Read once: a process's launches, those that it keeps or captures too, follow one choice.
ON = os.environ.get("PALKERNELS_GLUON") == "1"
STRIDE = 16  # elements: what Triton knows divides an argument, and a copy of 16 bytes needs


class Layout(NamedTuple):
    """How a program of the Gluon kernel divides its work."""

    tile: tiles.Tile  # block_m rows of a consumer
    consumers: int
    stages: int  # of each ring
    registers: int  # of a consumer's thread


# By head dim. Registers of all warpgroups, with the producer's, are at most a multiprocessor's 65,536.
LAYOUTS = {
    64: Layout(tiles.Tile(64, 64, num_warps=4, num_stages=1), consumers=4, stages=4, registers=104),
    128: Layout(tiles.Tile(64, 64, num_warps=4, num_stages=1), consumers=3, stages=4, registers=152),
}


def takes(call: Call, capability: int | None) -> bool:
    """Whether the Gluon kernel runs a forward; where it does not, the Triton kernel does."""
    return ON and not reasons(call, capability)


def reasons(call: Call, capability: int | None) -> list[str]:
    """Why the Gluon kernel cannot run a prepared call, all at once. ``capability`` is 90 for 9.0; None: interpreted.

    None of them depends on the number of text keys, so that they hold for a text that grows.
    """
    floats = call.floats()
    found = []
    if capability is None or tiles.architecture(capability) != 90:
        found.append(f"the GPU must have compute capability 9.x, got {_named(capability)}")
    if not has_gluon():
        found.append("triton must have triton.experimental.gluon")
    if {x.dtype for x in floats.values()} not in ({torch.float16}, {torch.bfloat16}):
        found.append(f"tensors must all be float16 or all bfloat16, got {[str(x.dtype) for x in floats.values()]}")
    if call.head_dim not in LAYOUTS:
        found.append(f"the head dim must be one of {', '.join(map(str, LAYOUTS))}, got {call.head_dim}")
    for name in ("audio_visible_from", "softcap", "window", "cu_seqlens"):
        if getattr(call, name) is not None:
            found.append(f"{name} must be None")
    if call.scale is None or call.scale <= 1e-30:  # 0 times the -inf of hidden keys would be NaN
        found.append(f"scale must be above 1e-30, got {call.scale}")
    for name, tensor in floats.items():
        *strides, dim = tensor.stride()
        if dim != 1 or any(stride % STRIDE for stride in strides) or tensor.data_ptr() % 16:
            found.append(
                f"{name} must be aligned to 16 bytes, with strides that are multiples of 16, and 1 of its dims"
            )
    if "forward" in tiles.overrides:
        found.append("another tile of the forward kernel must not be in use")
    return found


@cache
def has_gluon() -> bool:
    """Whether the installed Triton, if there is one, has Gluon."""
    try:
        return importlib.util.find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _named(capability: int | None) -> str:
    return "Triton's interpreter" if capability is None else f"{capability // 10}.{capability % 10}"
