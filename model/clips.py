"""Audio tokens of many clips, brought into the rows of a batch of texts: several encoders' tokens of one clip one after
the other, several clips of one text one after the other, never padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Clips(NamedTuple):
    """Audio tokens (A, N, d), of which the first ``lengths`` (A,) of each row are valid."""

    states: Tensor
    lengths: Tensor

    def valid(self) -> Tensor:
        """(A, N), True where a token is valid."""
        return torch.arange(self.states.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)


@dataclass(frozen=True)
class Rows:
    """The audio of a batch of texts."""

    audio: Clips
    index: Tensor | None  # (B,) row of each text where texts share clips; None: row for row
    part: Tensor  # (A, N) which of its text's clips each token belongs to, not decreasing

    def each(self) -> Clips:
        """One row for each text."""
        if self.index is None:
            return self.audio
        return Clips(self.audio.states[self.index], self.audio.lengths[self.index])

    def places(self, insert_at: Tensor) -> Tensor:
        """Where each audio token stands in its text (B, N), from where each clip stands (B, K)."""
        return insert_at.gather(1, self.part if self.index is None else self.part[self.index])


def join(parts: Sequence[Clips]) -> tuple[Clips, Tensor]:
    """Row by row, the valid tokens of all parts one after the other, and padding to the longest row behind them; and
    the part of each token (A, N), not decreasing."""
    states, lengths = torch.cat([part.states for part in parts], dim=1), sum(part.lengths for part in parts)
    assert isinstance(lengths, Tensor)
    longest = states.shape[1]
    if not torch.compiler.is_compiling() and lengths.numel():
        longest = int(lengths.max())  # other padding would pass through every layer's projections
    origin = torch.cat([lengths.new_full((part.states.shape[1],), i) for i, part in enumerate(parts)])
    if len(parts) == 1:
        return Clips(states[:, :longest], lengths), origin[:longest].expand(len(lengths), -1)
    valid = torch.cat([part.valid() for part in parts], dim=1)
    order = torch.argsort(valid.logical_not().byte(), dim=1, stable=True)[:, :longest]
    states = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return Clips(states, lengths), origin[order].cummax(dim=1).values


def rows_of(clips: Clips, index: Tensor) -> Rows:
    """The clips ``index`` (B, K) of each text, -1 where there is none. Where a clip is heard twice, texts that hear the
    same share a row."""
    heard, row = index[index >= 0], None
    if torch.unique(heard).numel() < heard.numel():
        index, row = torch.unique(index, dim=0, return_inverse=True)
    audio, part = join([_taken(clips, column) for column in index.unbind(dim=1)])
    return Rows(audio, row, part)


def _taken(clips: Clips, column: Tensor) -> Clips:
    if torch.equal(column, torch.arange(len(clips.lengths), device=column.device)):
        return clips
    at = column.clamp(min=0)
    return Clips(clips.states[at], clips.lengths[at].masked_fill(column < 0, 0))


def summaries(clips: Clips, count: int) -> Clips:
    """Each clip's n valid tokens averaged to ``count``: token i is the mean of those from floor(i n / count) to, but
    not including, ceil((i + 1) n / count), as in ``adaptive_avg_pool1d``."""
    steps = torch.arange(count, device=clips.lengths.device)
    length = clips.lengths.unsqueeze(1)
    first = (steps * length).div(count, rounding_mode="floor").unsqueeze(-1)  # (A, count, 1)
    last = -(-(steps + 1) * length).div(count, rounding_mode="floor").unsqueeze(-1)
    token = torch.arange(clips.states.shape[1], device=clips.lengths.device)
    taken = ((token >= first) & (token < last)).to(clips.states.dtype)
    states = clips.states.masked_fill(~clips.valid().unsqueeze(-1), 0)
    pooled = (taken / taken.sum(dim=-1, keepdim=True).clamp(min=1)) @ states
    return Clips(pooled, torch.where(clips.lengths > 0, count, 0))
