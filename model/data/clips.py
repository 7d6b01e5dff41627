"""How long clips are, told by their headers: before training it is known which are missing, unreadable or too long."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
from torch import Tensor
from tqdm.auto import tqdm

from palkernels.model.audio.files import ClipLength, clip_length
from palkernels.model.audio.limits import AudioError
from palkernels.model.data.reasons import AUDIO_MISSING, TOO_LONG, UNREADABLE, RejectedError

__all__ = ["LengthsOfClips"]

THREADS = 8  # that wait for a disk or a network


class LengthsOfClips:
    """The lengths of clips, each file looked at once."""

    def __init__(self) -> None:
        self._of_files: dict[str, ClipLength | RejectedError] = {}

    def look_at(self, clips: Iterable[Any], *, progress: bool = False) -> None:
        """Look at the headers of all files among clips that have not been looked at yet."""
        paths = list(dict.fromkeys(clip for clip in clips if isinstance(clip, str) and clip not in self._of_files))
        if not paths:
            return
        with ThreadPoolExecutor(THREADS) as pool:
            results = pool.map(_look_at, paths)
            shown = tqdm(results, "clips", len(paths), disable=None if progress else True)
            self._of_files.update(zip(paths, shown, strict=True))

    def of(self, clip: Any) -> ClipLength:
        """Return the length of a clip: a path, bytes, or a dict with either or with an array and its rate.

        Raises:
            AudioError: It cannot be read.
        """
        length = self._length(clip)
        if isinstance(length, RejectedError):
            raise AudioError(length.detail)
        return length

    def unfit(self, clips: Sequence[Any], max_seconds: float | None) -> RejectedError | None:
        """Return what is wrong with the first of a sample's clips that cannot be used; None if all can."""
        for clip in clips:
            length = self._length(clip)
            if isinstance(length, RejectedError):
                return length
            if max_seconds is not None and length.seconds > max_seconds:
                called = f"audio file {clip!r}" if isinstance(clip, str) else "audio"
                return RejectedError(
                    TOO_LONG, f"{called} must be at most {max_seconds:g} s long, got {length.seconds:.2f} s"
                )
        return None

    def _length(self, clip: Any) -> ClipLength | RejectedError:
        if not isinstance(clip, str):
            return _look_at(clip)
        if clip not in self._of_files:
            self._of_files[clip] = _look_at(clip)
        return self._of_files[clip]


def _look_at(clip: Any) -> ClipLength | RejectedError:
    """Return the length of a clip, or why it cannot be told."""
    if isinstance(clip, Mapping) and isinstance(clip.get("array"), numpy.ndarray | Tensor):
        return ClipLength(len(clip["array"]), int(clip["sampling_rate"]))
    if isinstance(clip, Mapping):
        clip = clip.get("bytes") or clip.get("path")
    if isinstance(clip, str) and not os.path.exists(clip):
        return RejectedError(AUDIO_MISSING, f"audio file {clip!r} must exist, got no such file")
    try:
        return clip_length(clip)
    except AudioError as error:
        return RejectedError(UNREADABLE, str(error))
