"""Compile the driver that does nothing, once for each version of its source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from palkernels.bench.errors import UserError

__all__ = ["LIBRARY", "build_driver"]

LIBRARY = "libcuda.so.1"
SOURCE = Path(__file__).with_name("driver.c")


def build_driver(cache: Path) -> Path:
    """Return a folder below `cache` that holds the library, compiled if it is not there yet.

    Raises:
        UserError: there is no C compiler, it fails, or the folder cannot be written.
    """
    source = SOURCE.read_bytes()
    folder = cache / hashlib.sha256(source).hexdigest()[:16]
    library = folder / LIBRARY
    if library.exists():
        return folder
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UserError("the stand-in for a GPU must have a C compiler (CC, cc, gcc or clang), got none")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            built = Path(building) / LIBRARY
            options = ["-shared", "-fPIC", "-O2", "-w", f"-Wl,-soname,{LIBRARY}", "-o", str(built), str(SOURCE)]
            done = subprocess.run([*compiler.split(), *options], capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                raise UserError(f"the stand-in's driver must compile with {compiler}, got: {reason}")
            built.replace(library)  # at once: other processes may build it, too
    except OSError as error:
        raise UserError(f"the stand-in's driver must be built in {folder}, got {error}") from error
    return folder
