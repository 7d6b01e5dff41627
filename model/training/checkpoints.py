"""Folders that are there whole or not at all: a process may be killed at any moment.

A folder is written under another name, its files are put on the disk, and then it gets its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "PREFIX",
    "STAGE",
    "TRAINED",
    "WRITING",
    "checkpoints_in",
    "finish",
    "read_json",
    "unfinished",
    "whole_folder",
    "write_json",
]

TRAINED, STAGE = "trained.safetensors", "stage.json"  # in a finished stage's folder
PREFIX = "step-"
WRITING = ".writing-"


def unfinished(folder: Path) -> Path:
    """Return where a folder is written until it is whole."""
    return folder.with_name(WRITING + folder.name)


def finish(folder: Path) -> None:
    """Give a folder its own name, once all of it is on the disk."""
    written = unfinished(folder)
    for path in [*written.rglob("*"), written]:
        _sync(path)
    if folder.exists():
        shutil.rmtree(folder)
    written.rename(folder)
    _sync(folder.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield where to write what shall be in a folder, which then is there whole."""
    written = unfinished(folder)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    yield written
    finish(folder)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the whole checkpoints in a folder, the last one last."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all."""
    written = path.with_name(WRITING + path.name)
    written.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    _sync(written)
    written.replace(path)
    _sync(path.parent)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
