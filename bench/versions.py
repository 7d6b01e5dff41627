"""The versions that are tested, and what is known against others: packages, and the assembler of Triton kernels."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CAPABILITIES", "PTXAS_FIXED", "TESTED", "Assembler", "against", "find_assembler"]

# The oldest and the newest series. Both ends are tested, by constraints-oldest.txt and constraints.txt.
TESTED = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", "3.8"),
    "transformers": ("5.17", "5.24"),
    "numpy": ("2.3", "2.4"),
    "torchaudio": ("2.11", "2.11"),
}
CAPABILITIES = (80, 90, 100)  # that kernels are compiled for, ahead of time
# Before it, ptxas may give a register to something else while an asynchronous product of Hopper still reads it:
# public reports of wrong products and gradients, and NVIDIA's release notes of CUDA 13.3.
PTXAS_FIXED = (13, 3)


def against(name: str, version: str) -> str | None:
    """Return that a version of a package lies outside of what is tested, or None where it does not."""
    if name not in TESTED:
        return None
    oldest, newest = TESTED[name]
    tested = oldest if oldest == newest else f"{oldest} to {newest}"
    series = _series(version)
    if series < _series(oldest):
        return f"older than what is tested, {tested}"
    return f"newer than what is tested, {tested}" if series > _series(newest) else None


def _series(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Assembler:
    """The ptxas that Triton takes for one compute capability."""

    capability: int
    path: Path
    version: str
    variable: str | None  # of the environment, which names it; None: it is Triton's own

    def against(self) -> str | None:
        """Return what is known against it, or None."""
        if self.capability != 90 or _series(self.version) >= PTXAS_FIXED:
            return None
        fixed = ".".join(map(str, PTXAS_FIXED))
        return (
            f"before {fixed} ptxas is reported to compute wrong products and gradients on sm_90: name a newer one in "
            "TRITON_PTXAS_PATH, or take triton 3.9, which brings one"
        )


def find_assembler(capability: int) -> Assembler:
    """Return the ptxas that Triton takes for a compute capability.

    Raises:
        RuntimeError: there is no Triton, or it finds none.
    """
    try:
        tool = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(capability)
    except ImportError as error:
        raise RuntimeError(f"triton cannot be imported ({error})") from error
    variables = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
    variable = next((name for name in variables if os.environ.get(name) == tool.path), None)
    return Assembler(capability, Path(tool.path), tool.version, variable)
