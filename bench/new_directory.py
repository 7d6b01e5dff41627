"""Directories that a command makes whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palkernels.bench.errors import UserError

__all__ = ["check_new", "staged"]


def check_new(directory: Path) -> None:
    """Raise a UserError if there is something already where a directory is to be made."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        got = "one with something in it" if directory.is_dir() else "a file"
        raise UserError(f"{str(directory)!r} must be a new or empty directory, got {got}")


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Let a directory be written elsewhere and come into being as a whole. Where that fails nothing is left.

    One that is there already, and empty, gets its files one after the other, config.json last: without it a directory
    holds no model.
    """
    there = directory.exists()
    folder = (directory if there else directory.resolve().parent) / f".{directory.resolve().name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        yield folder
        if not there:
            folder.rename(directory)
            return
        for file in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            file.rename(directory / file.name)
        folder.rmdir()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
