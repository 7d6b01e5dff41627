"""A clip's states as vLLM's encoder cache holds them, one row for each placeholder.

    audio enters by    rows of a clip                            columns
    LAL                its LAL tokens                            d
    PLITS              its PLITS tokens                          d
    both               its LAL tokens, then its PLITS tokens     d + 1, the last one 1 in LAL's rows, 0 in PLITS'

So LAL's audio stands before the clip's placeholders of PLITS, as the processor has it without vLLM.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from palkernels.model.pal.clips import AudioFeatures, Clips

__all__ = ["pack", "split_rows"]


def pack(features: AudioFeatures, dtype: torch.dtype) -> list[Tensor]:
    """Return the rows of every clip.

    Args:
        features: of all clips.
        dtype: of the rows.
    """
    parts = [part for part in (features.lal, features.plits) if part is not None]
    if len(parts) == 1:
        return [clip.to(dtype) for clip in _clips(parts[0])]
    marked = [
        [nn.functional.pad(clip.to(dtype), (0, 1), value=mark) for clip in _clips(part)]
        for part, mark in zip(parts, (1.0, 0.0), strict=True)
    ]
    return [torch.cat(clip) for clip in zip(*marked, strict=True)]


def _clips(part: Clips) -> Sequence[Tensor]:
    return [states[:length] for states, length in zip(part.states, part.lengths.tolist(), strict=True)]


def split_rows(rows: Tensor, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Return which rows of a step are LAL's and which PLITS', and the states of both.

    Args:
        rows: (audio rows, d + 1) in the order of the step.
        audio: (n,) bool, which rows of the step they are.
    """
    marks = rows[:, -1] > 0.5
    by_lal = audio.copy()
    by_lal[audio] = marks.numpy(force=True)
    return by_lal, audio & ~by_lal, rows[marks, :-1], rows[~marks, :-1]
