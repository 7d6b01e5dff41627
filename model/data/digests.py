"""Names of clips and encoders by what they are: SHA-256 of a clip's bytes, and of an encoder with its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from palkernels.errors import one_line
from palkernels.model.audio.limits import AudioError
from palkernels.model.encoders.base import Tower

__all__ = ["ClipDigests", "tower_digest"]


class ClipDigests:
    """Names clips by their bytes. A file is read again only where its size or time of change is another."""

    def __init__(self) -> None:
        self._of_files: dict[str, tuple[int, int, str]] = {}

    def of(self, clip: Any) -> str:
        """Return the name of a clip: a path, bytes, or a dict with either or with an array and its rate.

        Raises:
            AudioError: The file cannot be read, or it is none of these.
        """
        if isinstance(clip, Mapping):
            if clip.get("array") is not None:
                return _of_array(clip["array"], clip.get("sampling_rate"))
            clip = clip.get("bytes") or clip.get("path")
        if isinstance(clip, bytes):
            return hashlib.sha256(clip).hexdigest()
        if not isinstance(clip, str | os.PathLike):
            raise AudioError(f"audio must be a path, bytes or a dict to be kept, got {type(clip).__name__}")
        path = os.fspath(clip)
        try:
            status = os.stat(path)
            known = self._of_files.get(path)
            if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
                known = status.st_size, status.st_mtime_ns, hashlib.sha256(Path(path).read_bytes()).hexdigest()
                self._of_files[path] = known
        except OSError as error:
            raise AudioError(
                f"audio file {path!r} must be readable, got {one_line(error.strerror or error)}"
            ) from error
        return known[2]


def tower_digest(tower: Tower, **about: Any) -> str:
    """Return the name of an encoder: of its kind, its config, its weights in their dtype, and what else is said."""
    config = {name: value for name, value in tower.config.items() if name not in ("seed", "freeze")}
    described = {"tower": type(tower).__name__, "config": config, **about}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_bytes_of(weight))
    return digest.hexdigest()


def _of_array(array: Any, rate: Any) -> str:
    tensor = torch.from_numpy(numpy.ascontiguousarray(array)) if isinstance(array, numpy.ndarray) else array
    if not isinstance(tensor, Tensor):
        raise AudioError(f"audio must be a NumPy array or a tensor, got {type(array).__name__}")
    digest = hashlib.sha256(f"array {tensor.dtype} {tuple(tensor.shape)} {rate}".encode())
    digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
