"""Clips longer than an encoder hears: cut into windows, encoded window by window, and joined again.

    clip of 25 s, an encoder of 10 s     [ 10 s ][ 10 s ][ 5 s ]     windows, rows of input_features
    states of each window                [ 64   ][ 64   ][ 32 ...]   the last one's valid states come first
    the clip's states                    160, which audio_lengths says

All windows of a clip but its last are full. So the clip's states alone say how many windows it has, and where there
are as many rows as clips each row is a clip. An entry that fuses several towers cuts for all of them at the same times.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palkernels.model.audio.features import Features
from palkernels.model.connectors.base import Connector
from palkernels.model.encoders.base import Tower
from palkernels.model.pal.clips import Clips
from palkernels.model.pal.parts import by_entry

__all__ = [
    "Window",
    "encode",
    "features_of",
    "join_windows",
    "output_lengths",
    "state_length",
    "window_lengths",
    "windows_of",
]


class Window(NamedTuple):
    """What a tower is given of a clip at once."""

    samples: int  # of a full window
    states: int  # that are valid of it


def windows_of(encoders: Sequence[dict[str, Any]], features: Sequence[Features]) -> list[Window]:
    """Return every tower's window: what it hears, and of towers that an entry fuses what all of them hear.

    Args:
        encoders: The entries of a config.
        features: Of every tower.
    """
    windows = []
    for _, of_towers in by_entry(encoders, features):
        for one in of_towers:
            samples = min(other.max_samples * one.sampling_rate // other.sampling_rate for other in of_towers)
            windows.append(Window(samples, one.state_length(samples)))
    return windows


def features_of(clips: Sequence[Tensor], features: Features, window: Window) -> tuple[Tensor, Tensor]:
    """Return a tower's features (W, ...) of the windows of all clips, in order, and the states (C,) of each clip.

    Args:
        clips: (samples,) each, at the tower's rate.
        features: The tower's.
        window: The tower's.
    """
    windows = [torch.split(clip, window.samples) for clip in clips]
    input_features, lengths = features([part for parts in windows for part in parts])
    of_clips = torch.split(lengths, [len(parts) for parts in windows])
    return input_features, torch.stack([parts.sum() for parts in of_clips])


def state_length(samples: int, features: Features, window: Window) -> int:
    """Return how many states of all windows together are valid for a clip of ``samples`` samples, at least 1."""
    full = (samples - 1) // window.samples
    return full * window.states + features.state_length(samples - full * window.samples)


def encode(tower: Tower, input_features: Tensor, most: int) -> Tensor:
    """Return the states (W, N, width) of windows, which pass the tower ``most`` at a time."""
    if input_features.ndim == 0 or input_features.shape[0] <= most:
        return tower(input_features)  # type: ignore[no-any-return]
    return torch.cat([tower(some) for some in torch.split(input_features, most)])


def window_lengths(lengths: Tensor, window: Window, count: int) -> tuple[Tensor, list[int] | None]:
    """Return the valid states (W,) of every window, and how many windows each clip has; None: one each.

    Reads the lengths, but where there are as many windows as clips.

    Args:
        lengths: (C,) valid states of each clip.
        window: The tower's.
        count: W, the windows that there are.

    Raises:
        ValueError: The clips have more or fewer windows.
    """
    if lengths.shape[0] == count:
        return lengths, None
    of_clips = [[window.states] * ((n - 1) // window.states) for n in lengths.tolist()]
    for parts, n in zip(of_clips, lengths.tolist(), strict=True):
        parts.append(n - sum(parts))
    counts = [len(parts) for parts in of_clips]
    if sum(counts) != count:
        raise ValueError(
            f"audio_lengths must be those of {count} windows of {window.states} states, got {lengths.tolist()} of "
            f"{sum(counts)}"
        )
    return lengths.new_tensor([n for parts in of_clips for n in parts]), counts


def join_windows(windows: Clips, counts: list[int] | None) -> Clips:
    """Join the valid tokens of each clip's windows in their order.

    Args:
        windows: Tokens (W, N, d).
        counts: How many windows each clip has; None: one.
    """
    if counts is None:
        return windows
    valid = [states[:length] for states, length in zip(windows.states, windows.lengths.tolist(), strict=True)]
    ends = list(accumulate(counts))
    clips = [torch.cat(valid[end - count : end]) for count, end in zip(counts, ends, strict=True)]
    return Clips(pad_sequence(clips, batch_first=True), windows.lengths.new_tensor([len(clip) for clip in clips]))


def output_lengths(connector: Connector, lengths: Tensor, window: Window) -> Tensor:
    """Return how many tokens (C,) a connector makes of clips of ``lengths`` (C,) states, window by window."""
    full = (lengths - 1).clamp(min=0) // window.states
    of_full = connector.output_lengths(torch.full_like(lengths, window.states))
    return full * of_full + connector.output_lengths(lengths - full * window.states)
