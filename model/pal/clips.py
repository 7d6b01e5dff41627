"""Audio tokens of many clips, brought to the texts of a batch.

Several encoders' tokens of one clip stand one after the other, and so do several clips of one text; there is never
padding between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

__all__ = ["AudioFeatures", "AudioRows", "Clips", "audio_rows", "join", "summaries", "token_places"]


class Clips(NamedTuple):
    """Audio tokens (A, N, d), of which the first ``lengths`` (A,) of each clip are valid."""

    states: Tensor
    lengths: Tensor

    def valid(self) -> Tensor:
        """Return (A, N), True where a token is valid."""
        return torch.arange(self.states.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(1)


@dataclass
class AudioFeatures(BaseModelOutputWithPooling):  # type: ignore[misc]
    """Encoded clips, by the way in which they enter the language model; None where nothing enters so.

    Given as ``audio_features=`` instead of ``input_features``, clips are encoded once for several calls.

    Args:
        last_hidden_state: the states (W, N, width) of the first encoder, window by window.
        pooler_output: the tokens (C, N, d) that the first connector makes of them, padding included.
        hidden_states: where they are asked for, the states of every encoder.
        plits, lal, flamingo: the clips' tokens.
    """

    plits: Clips | None = None
    lal: Clips | None = None
    flamingo: Clips | None = None

    def by_integration(self) -> dict[str, Clips]:
        """Return the clips' tokens by the way in which they enter."""
        ways = {"plits": self.plits, "lal": self.lal, "flamingo": self.flamingo}
        return {name: clips for name, clips in ways.items() if clips is not None}


@dataclass(frozen=True)
class AudioRows:
    """The audio of a batch of B texts. Texts that hear the same clips share an audio row: there are A <= B of them."""

    audio: Clips  # the clips of each audio row, joined: (A, N, d)
    index: Tensor  # (B,) audio row of each text
    clip: Tensor  # (A, N) which of its text's clips each token belongs to, not decreasing


def join(parts: Sequence[Clips]) -> tuple[Clips, Tensor]:
    """Join the valid tokens of all parts, one part after the other, with the padding behind them.

    Args:
        parts: Tokens (A, N_i, d) each, of one A.

    Returns:
        The joined tokens (A, N, d), and the number of the part that each comes from (A, N), not decreasing.
    """
    states, lengths = torch.cat([part.states for part in parts], dim=1), sum(part.lengths for part in parts)
    assert isinstance(lengths, Tensor)
    origin = torch.cat([lengths.new_full((part.states.shape[1],), i) for i, part in enumerate(parts)])
    if len(parts) == 1:
        return Clips(states, lengths), origin.expand(states.shape[:2])
    valid = torch.cat([part.valid() for part in parts], dim=1)
    order = torch.argsort(valid.logical_not().byte(), dim=1, stable=True)
    if not torch.compiler.is_compiling() and lengths.numel():
        order = order[:, : int(lengths.max())]  # columns of padding would pass through every layer's projections
    states = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    return Clips(states, lengths), origin[order].cummax(dim=1).values


def audio_rows(clips: Clips, index: Tensor) -> AudioRows:
    """Return the audio of each text from the clips that it hears, ``index`` (B, K), -1 where there is none."""
    if torch.compiler.is_compiling():  # how many differ depends on values
        distinct, row_of_text = index, torch.arange(index.shape[0], device=index.device)
    else:
        distinct, row_of_text = torch.unique(index, dim=0, return_inverse=True)
    parts = []
    for column in distinct.unbind(dim=1):
        number = column.clamp(min=0)
        parts.append(Clips(clips.states[number], clips.lengths[number].masked_fill(column < 0, 0)))
    audio, clip = join(parts)
    return AudioRows(audio, row_of_text, clip)


def token_places(rows: AudioRows, insert_at: Tensor, index: Tensor) -> Tensor:
    """Return where audio stands in each text, as ``AudioState`` takes it: (B,) for one clip a text, else (B, N).

    Args:
        rows: The audio, by :func:`audio_rows`.
        insert_at: Where each clip of a text stands in it, (B, K) or for one clip (B,).
        index: The clips (B, K) of each text, -1 where there is none.

    Raises:
        ValueError: ``insert_at`` has another shape.
    """
    places = insert_at.to(index.device)
    if places.ndim == 1:
        places = places.unsqueeze(1)
    if places.shape != index.shape:  # another order of the same numbers must not pass
        raise ValueError(f"insert_at must be (B, K) = {tuple(index.shape)}, got {tuple(insert_at.shape)}")
    # Where there is no clip there is no place: it takes that of the clip before it, so that places do not decrease.
    clip_before = places.masked_fill(index < 0, 0).cummax(dim=1).values
    places = torch.where(index < 0, clip_before, places)
    return places.squeeze(1) if places.shape[1] == 1 else places.gather(1, rows.clip[rows.index])


def summaries(clips: Clips, count: int) -> Clips:
    """Average each clip's n valid tokens to ``count`` tokens.

    Token i is the mean of those from floor(i n / count) to, but not including, ceil((i + 1) n / count), as in
    ``adaptive_avg_pool1d``. An empty clip has none.
    """
    steps = torch.arange(count, device=clips.lengths.device)
    length = clips.lengths.unsqueeze(1)
    first = (steps * length).div(count, rounding_mode="floor").unsqueeze(-1)  # (A, count, 1)
    last = -(-(steps + 1) * length).div(count, rounding_mode="floor").unsqueeze(-1)
    token = torch.arange(clips.states.shape[1], device=clips.lengths.device)
    averaged = ((token >= first) & (token < last)).to(clips.states.dtype)
    states = clips.states.masked_fill(~clips.valid().unsqueeze(-1), 0)
    pooled = (averaged / averaged.sum(dim=-1, keepdim=True).clamp(min=1)) @ states
    return Clips(pooled, torch.where(clips.lengths > 0, count, 0))
