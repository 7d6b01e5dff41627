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
    """The audio of a batch of texts. Texts that hear the same clips share a row: there are A <= B of them."""

    audio: Clips
    index: Tensor  # (B,) row of each text
    part: Tensor  # (A, N) which of its text's clips each token belongs to, not decreasing


def join(parts: Sequence[Clips]) -> tuple[Clips, Tensor]:
    """Row by row, the valid tokens of all parts one after the other, padding behind them; and the part of each token
    (A, N), not decreasing."""
    states, lengths = torch.cat([part.states for part in parts], dim=1), sum(part.lengths for part in parts)
    assert isinstance(lengths, Tensor)
    origin = torch.cat([lengths.new_full((part.states.shape[1],), i) for i, part in enumerate(parts)])
    if len(parts) == 1:
        return Clips(states, lengths), origin.expand(states.shape[:2])
    valid = torch.cat([part.valid() for part in parts], dim=1)
    order = torch.argsort(valid.logical_not().byte(), dim=1, stable=True)
    if not torch.compiler.is_compiling() and lengths.numel():
        order = order[:, : int(lengths.max())]  # rows of padding would pass through every layer's projections
    states = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return Clips(states, lengths), origin[order].cummax(dim=1).values


def rows_of(clips: Clips, index: Tensor) -> Rows:
    """The clips ``index`` (B, K) of each text, -1 where there is none."""
    distinct, row = torch.unique(index, dim=0, return_inverse=True)
    parts = []
    for column in distinct.unbind(dim=1):
        taken = column.clamp(min=0)
        parts.append(Clips(clips.states[taken], clips.lengths[taken].masked_fill(column < 0, 0)))
    audio, part = join(parts)
    return Rows(audio, row, part)


def places(rows: Rows, insert_at: Tensor) -> Tensor:
    """Where each audio token stands in its text (B, N), from where each clip stands (B, K)."""
    return insert_at.gather(1, rows.part[rows.index])


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
