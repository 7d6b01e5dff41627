"""Compile the shipped tiles that the tests try, ahead of time, for the GPUs on the command line: a JSON row for each.

bfloat16 on Hopper, with padding and with every option, and on Ampere with every option, which takes the most registers;
of these three, the kernels and the head dims every pair. With every option, decoding's tiles have the most rows: those
of fewer rows keep less, and compile with padding; on Hopper also with audio in eight bits. With
``PALKERNELS_TESTS=all`` every triple, on Hopper without any option too, and all rows; with ``PALKERNELS_AOT=all``, as
``make aot`` sets it, all options, every dtype, and Blackwell.
"""

import json
import os
import sys
from dataclasses import asdict

import torch

from palkernels.kernels import tiles
from palkernels.kernels.aot import FEATURES, HEAD_DIMS, compile_kernel, shipped_variants
from support import thorough

EVERYTHING = os.environ.get("PALKERNELS_AOT") == "all"
CAPABILITIES = [80, 90, 100] if EVERYTHING else [80, 90]
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if EVERYTHING else (torch.bfloat16,)
EIGHT_BITS = ("eight bits",)
OPTIONS = dict.fromkeys(CAPABILITIES, FEATURES + EIGHT_BITS) if EVERYTHING else {
    80: ("all",), 90: (*(FEATURES if thorough.EVERYTHING else ("padding", "all")), *EIGHT_BITS)
}  # fmt: skip
GPUS_WITH_OPTIONS = [(capability, features) for capability in CAPABILITIES for features in OPTIONS[capability]]


def variants(capability):
    """Arguments of `compile_kernel` for each tile."""
    shipped = shipped_variants(capability, DTYPES, features=OPTIONS[capability])
    if EVERYTHING or thorough.EVERYTHING:
        return shipped
    tried = thorough.combinations(tiles.KERNELS, HEAD_DIMS, GPUS_WITH_OPTIONS)
    return [
        (kernel, *about, head_dim, tile, features)
        for kernel, *about, head_dim, tile, features in shipped
        if (kernel, head_dim, (capability, features)) in tried
        and (features in ("padding", "eight bits") or tile == most_rows(kernel, *about, head_dim, features))
    ]


def most_rows(kernel, capability, dtype, head_dim, features):
    return tiles.choose(kernel, capability, dtype, head_dim, features == "all")


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for variant in variants(capability):
            for row in compile_kernel(*variant):
                print(json.dumps(asdict(row)), flush=True)
