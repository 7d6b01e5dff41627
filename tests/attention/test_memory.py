"""The kernels touch nothing out of bounds, and no offset overflows."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import interpreter
from support.kernel_runs import attention

from palkernels.kernels import tiles
from palkernels.testing import FEATURES, lal_case

GUARDED = Path(__file__).parents[1] / "lib" / "support" / "guarded.py"


def run_guarded(side):
    return subprocess.run([sys.executable, GUARDED, side], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("side", ["after", "before"])
def test_between_unreadable_pages(side):
    done = run_guarded(side)
    assert done.returncode == 0, f"died at: {done.stdout.splitlines()[-1:]}\n{done.stderr}"


def test_the_pages_are_unreadable():
    done = run_guarded("control")
    assert done.returncode < 0
    assert done.stdout == "reading one element too many\n"


@pytest.mark.parametrize("seed", range(6))
def test_no_integer_overflows(seed):
    """No 32-bit product overflows in live or in masked lanes; test_kernels.py has the strides beyond 2^31."""
    case = lal_case(
        batch=2, heads=6, kv_heads=2, queries=9, keys=20, audio=19, dim=24, features=FEATURES[seed:],
        audio_rows=3, seed=seed, poison=True,
    )  # fmt: skip
    with interpreter.overflow_checks(), tiles.use(tiles.Tile(16, 16, 4, 1)):
        attention(case, "triton")


def test_overflow_checks_see_an_overflow():
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, stride):
        tl.store(out, stride * stride)

    with interpreter.overflow_checks(), pytest.raises(Exception, match="overflow"):
        kernel[(1,)](torch.zeros(1, dtype=torch.int32), 2**20)
