"""From a validated call to a kernel launch; the same launch can be compiled ahead of time instead."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from palkernels.arguments import Call
from palkernels.kernels import primitives
from palkernels.kernels.operands import Sizes, Visibility
from palkernels.kernels.tiles import Tile

INTERPRETED = bool(primitives.INTERPRETED)


@dataclass(frozen=True)
class Launch:
    """One kernel with all its arguments; programs lie on grid axis 0, the only one without a 65,535 limit."""

    kernel: Any
    num_programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    device: torch.device

    def run(self) -> Any:
        """Launch it, and return the compiled kernel; None where there is none, or where there are no programs."""
        if self.num_programs == 0:
            return None
        on_device = contextlib.nullcontext() if INTERPRETED else torch.cuda.device(self.device)
        with on_device:
            return self.kernel[(self.num_programs,)](*self.arguments, **self.constants)

    def compile(self) -> Any:
        """The compiled kernel, for the active driver's target; nothing runs."""
        return self.kernel.warmup(*self.arguments, grid=(max(self.num_programs, 1),), **self.constants)


def attention_launch(kernel: Any, num_programs: int, tile: Tile, call: Call, *tensors: Any, **constants: Any) -> Launch:
    """A launch of a kernel that takes ``tensors``, what the attention kernels have in common, and ``constants``."""
    sizes = Sizes(
        num_queries=call.num_queries,
        num_keys=call.num_keys,
        num_audio=call.num_audio,
        num_audio_rows=call.num_audio_rows,
        num_batches=call.num_batches,
        num_kv_heads=call.num_kv_heads,
        text_tokens=call.query.shape[2],
        audio_tokens=call.audio_key.shape[2],
        window=call.window,
    )
    return Launch(
        kernel,
        num_programs,
        (*tensors, Visibility.of(**call.integers()), *sizes),
        {
            "SCALE": call.scale,
            "SOFTCAP": call.softcap,
            "GROUP": call.group,
            "HEAD_DIM": call.head_dim,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            **constants,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "maxnreg": tile.max_registers,
        },
        call.query.device,
    )
