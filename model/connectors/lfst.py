"""What LFST is made of: where encoders' tokens lie in seconds and hertz, which of them a time-frequency cell sees, and
the layer that gathers them there."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["CLAP_GRID", "SSLAM_GRID", "AggregatorLayer", "AudioGrid", "cell_windows"]

NONE = -1  # in a window: no token
MEL_SCALES = ("htk", "slaney")
# Slaney's scale (Auditory Toolbox, 1998): linear up to a corner, logarithmic beyond it.
CORNER_HZ, CORNER_MEL = 1000.0, 15.0
MELS_PER_E = 27 / math.log(6.4)


@dataclass(frozen=True)
class AudioGrid:
    """A time x frequency grid of tokens over a log-mel spectrogram, tokens in time-major order.

    Args:
        time, freq: Tokens along each axis; token (t, f) is number ``t * freq + f``.
        seconds: What the time axis spans, divided evenly.
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
        """Seconds at which tokens begin and end, ``time + 1`` of them."""
        return tuple(i * self.seconds / self.time for i in range(self.time + 1))

    def freq_edges(self) -> tuple[float, ...]:
        """Hertz at which tokens begin and end, ``freq + 1`` of them.

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
    """Which tokens of one grid each cell of another sees, by seconds and hertz.

    Along either axis a cell sees the tokens whose middles lie in it. Where there are none, since tokens are larger than
    cells, it sees the token that covers its own middle, or the nearest if none does. So where tokens are smaller each
    is seen by at most one cell (by none beyond the cells' axis), and where they are larger each cell sees one.

    Returns:
        index (cells, W), int64: token numbers, cells in time-major order. W is the product of the most tokens that a
        cell sees along time and along frequency, the window's slots being time-major too; W = 1 makes it a map from
        cells to tokens.
        seen (cells, W), bool: False in the slots that a cell has no token for, where ``index`` is 0.
    """
    times = _windows(cells.time_edges(), tokens.time_edges())
    freqs = _windows(cells.freq_edges(), tokens.freq_edges())
    index = [
        [t * tokens.freq + f if t >= 0 and f >= 0 else NONE for t in of_time for f in of_freq]
        for of_time in times
        for of_freq in freqs
    ]
    # On the CPU whatever the default is: on the meta device there would be no values.
    found = torch.tensor(index, dtype=torch.int64, device="cpu")
    return found.clamp(min=0), found >= 0


class AggregatorLayer(nn.Module):
    """One layer of Cambrian-1's spatial aggregator, of the kind with one softmax over all encoders' windows.

    With q a cell's token, g the clip's mean and e_is the token of encoder i in slot s of the cell's window:

        x = W_in [q ; W_g g]
        k_is = W_k,i norm_k,i(e_is + p_is);  v_is = W_v,i norm_v,i(e_is + p_is)
        x = x + W_o softmax(W_q norm(x) . k) v      over all i and s, in each head
        q = q + W_2 gelu(W_1 norm(x))

    p_is are learnt, there only for encoders whose windows have several slots. No Linear has a bias.
    """

    def __init__(self, width: int, num_heads: int, slots: Sequence[int]) -> None:
        super().__init__()

        def linear(input_size: int) -> nn.Linear:
            return nn.Linear(input_size, width, bias=False)

        self.num_heads = num_heads
        self.context = linear(width)
        self.input = linear(2 * width)
        self.to_query = nn.Sequential(nn.LayerNorm(width), linear(width))
        self.to_key = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), linear(width)) for _ in slots)
        self.to_value = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), linear(width)) for _ in slots)
        self.places = nn.ParameterDict({str(i): torch.randn(n, width) for i, n in enumerate(slots) if n > 1})
        self.attended = linear(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(linear(width), nn.GELU(), linear(width))

    def forward(
        self,
        cells: Tensor,  # (B, C, width)
        context: Tensor,  # (B, width)
        encoders: list[Tensor],  # (B, N_i, width)
        windows: list[tuple[Tensor, Tensor]],  # (C, W_i): token numbers, and whether they are seen
    ) -> Tensor:
        told = self.context(context).unsqueeze(1).expand(-1, cells.shape[1], -1)
        hidden = self.input(torch.cat([cells, told], dim=-1))
        query = self._heads(self.to_query(hidden))  # (B, C, H, D)
        keys, values = [], []
        for i, (encoded, (index, _)) in enumerate(zip(encoders, windows, strict=True)):
            if str(i) in self.places:
                local = encoded[:, index] + self.places[str(i)]  # (B, C, W_i, width)
                keys.append(self._heads(self.to_key[i](local)))
                values.append(self._heads(self.to_value[i](local)))
            else:  # cells may share a token, which is projected once
                keys.append(self._heads(self.to_key[i](encoded))[:, index])
                values.append(self._heads(self.to_value[i](encoded))[:, index])
        key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)  # (B, C, W, H, D)
        seen = torch.cat([seen for _, seen in windows], dim=1)
        scores = torch.einsum("bchd,bcwhd->bcwh", query, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen.unsqueeze(-1), float("-inf")).softmax(dim=2)
        attended = torch.einsum("bcwh,bcwhd->bchd", weights, value)
        hidden = self.norm(hidden + self.attended(attended.flatten(2)))
        updated: Tensor = cells + self.mlp(hidden)
        return updated

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.num_heads, -1)


def _windows(cells: Sequence[float], tokens: Sequence[float]) -> list[list[int]]:
    """Along one axis, given edges: the tokens that each cell sees, filled up with NONE."""
    middles = [(low + high) / 2 for low, high in pairwise(tokens)]
    found = []
    for low, high in pairwise(cells):
        inside = [i for i, middle in enumerate(middles) if low <= middle < high]
        covering = bisect_right(tokens, (low + high) / 2) - 1
        found.append(inside or [min(max(covering, 0), len(middles) - 1)])
    widest = max(map(len, found))
    return [window + [NONE] * (widest - len(window)) for window in found]


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
