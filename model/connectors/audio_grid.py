"""Where encoders' tokens lie in seconds and hertz, and which of them a time-frequency cell sees."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["CLAP_GRID", "SSLAM_GRID", "AudioGrid", "cell_windows"]

NO_TOKEN = -1  # in a window's unused slots
MEL_SCALES = ("htk", "slaney")
# Slaney's scale (Auditory Toolbox, 1998): linear up to a corner, logarithmic beyond it.
CORNER_HZ, CORNER_MEL = 1000.0, 15.0
MELS_PER_E = 27 / math.log(6.4)


@dataclass(frozen=True)
class AudioGrid:
    """A time x frequency grid of tokens over a log-mel spectrogram, tokens in time-major order.

    Args:
        time, freq: Tokens along each axis; token (t, f) is number ``t * freq + f``.
        seconds: The span of the time axis, divided evenly among its tokens.
        mel_bins: Mel filters of the spectrogram, divided evenly among the ``freq`` tokens.
        low_hz, high_hz: Where the first filter begins and the last one ends.
        mel_scale: "htk", which is Kaldi's too, or "slaney".

    Raises:
        ValueError: A count is not a positive integer, a range is empty or the scale unknown.
    """

    time: int
    freq: int
    seconds: float
    mel_bins: int
    low_hz: float
    high_hz: float
    mel_scale: str = "htk"

    def __post_init__(self) -> None:
        for name in ("time", "freq", "mel_bins"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive integer, got {count!r}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive, got {self.seconds!r}")
        if not 0 <= self.low_hz < self.high_hz < math.inf:
            raise ValueError(f"low_hz must be from 0 to below high_hz, got {self.low_hz!r} and {self.high_hz!r}")
        if self.mel_scale not in MEL_SCALES:
            raise ValueError(f"mel_scale must be one of {', '.join(map(repr, MEL_SCALES))}, got {self.mel_scale!r}")

    @property
    def num_tokens(self) -> int:
        return self.time * self.freq

    def time_edges(self) -> tuple[float, ...]:
        """Return the seconds at which tokens begin and end, ``time + 1`` of them."""
        return tuple(i * self.seconds / self.time for i in range(self.time + 1))

    def freq_edges(self) -> tuple[float, ...]:
        """Return the frequencies in hertz at which tokens begin and end, ``freq + 1`` of them.

        The filters' centres lie evenly on the mel scale, a step from each other and from the ends. Two neighbouring
        tokens meet in the middle between the centres of their last and first filter; the outer ones reach the ends.
        """
        low, high = _mel(self.low_hz, self.mel_scale), _mel(self.high_hz, self.mel_scale)
        step = (high - low) / (self.mel_bins + 1)
        inner = [low + (i * self.mel_bins / self.freq + 0.5) * step for i in range(1, self.freq)]
        return (float(self.low_hz), *(_hertz(mel, self.mel_scale) for mel in inner), float(self.high_hz))


# 1024 frames of 10 ms, Kaldi's filters from its default of 20 Hz up to half of 16 kHz, patches of 16 x 16.
SSLAM_GRID = AudioGrid(64, 8, 10.24, 128, 20.0, 8_000.0, "htk")
# 10 s, repeat-padded; transformers takes Slaney's filters for clips that are cut or padded to it ("rand_trunc").
CLAP_GRID = AudioGrid(32, 2, 10.0, 64, 50.0, 14_000.0, "slaney")


def cell_windows(cells: AudioGrid, tokens: AudioGrid) -> tuple[Tensor, Tensor]:
    """Return which tokens of one grid each cell of another sees, by seconds and hertz.

    Along either axis a cell sees the tokens whose middles lie in it. If there are none, because tokens are larger than
    cells, it sees the token that covers its own middle, or the nearest if none does. So a token that is smaller than
    cells is seen by at most one of them (by none beyond the cells' axis), and of larger tokens each cell sees one.

    Returns:
        index (cells, W), int64: token numbers, cells in time-major order. W is the product of the most tokens that a
        cell sees along time and along frequency, the window's slots being time-major too; W = 1 makes it a map from
        cells to tokens.
        seen (cells, W), bool: False in the slots that a cell has no token for, where ``index`` is 0.
    """
    times = _windows(cells.time_edges(), tokens.time_edges())
    freqs = _windows(cells.freq_edges(), tokens.freq_edges())
    index = [
        [t * tokens.freq + f if t >= 0 and f >= 0 else NO_TOKEN for t in of_time for f in of_freq]
        for of_time in times
        for of_freq in freqs
    ]
    # On the CPU whatever the default is: on the meta device there would be no values.
    numbers = torch.tensor(index, dtype=torch.int64, device="cpu")
    return numbers.clamp(min=0), numbers >= 0


def _windows(cells: Sequence[float], tokens: Sequence[float]) -> list[list[int]]:
    """Return the tokens that each cell sees along one axis, from the edges of both; filled up with NO_TOKEN."""
    middles = [(low + high) / 2 for low, high in pairwise(tokens)]
    windows = []
    for low, high in pairwise(cells):
        inside = [i for i, middle in enumerate(middles) if low <= middle < high]
        covering = bisect_right(tokens, (low + high) / 2) - 1
        windows.append(inside or [min(max(covering, 0), len(middles) - 1)])
    widest = max(map(len, windows))
    return [window + [NO_TOKEN] * (widest - len(window)) for window in windows]


def _mel(hertz: float, scale: str) -> float:
    if scale == "htk":
        return 1127 * math.log1p(hertz / 700)
    if hertz < CORNER_HZ:
        return hertz * CORNER_MEL / CORNER_HZ
    return CORNER_MEL + MELS_PER_E * math.log(hertz / CORNER_HZ)


def _hertz(mel: float, scale: str) -> float:
    if scale == "htk":
        return 700 * math.expm1(mel / 1127)
    if mel < CORNER_MEL:
        return mel * CORNER_HZ / CORNER_MEL
    return CORNER_HZ * math.exp((mel - CORNER_MEL) / MELS_PER_E)
