"""Files of states: each is whole or not there, and one that has been damaged is as if it were not.

    <folder>/<encoder>/<first two digits>/<clip>.states     SHA-256 of the rest, then a safetensors file

A file is written under another name beside its place and then moved there, which replaces what was there at once. So
several processes may write one and the same, and one that is killed leaves at most a file that nobody reads.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from pathlib import Path

import safetensors.torch
from torch import Tensor

__all__ = ["StateFiles"]

DIGEST_BYTES = hashlib.sha256().digest_size
ABANDONED_SECONDS = 3600  # after which a file that nobody moved to its place is one of a process that was killed


class StateFiles:
    """The files of one encoder.

    Args:
        folder: Where they are; it is made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors that are kept under a name; None if there are none, or they have been damaged."""
        try:
            content = self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        stored, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != stored:
            return None
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors

    def save(self, name: str, tensors: dict[str, Tensor]) -> int:
        """Keep tensors under a name, and return how many bytes they take."""
        path = self._path(name)
        data = safetensors.torch.save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            beside.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return DIGEST_BYTES + len(data)

    def size(self, name: str) -> int:
        """Return how many bytes a file has that is there."""
        return self._path(name).stat().st_size

    def tidy(self) -> None:
        """Delete what processes that were killed have left."""
        for path in self.folder.glob("*/*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process was quicker

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.states"
