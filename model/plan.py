"""From an attention mask and an :class:`AudioState` to what every layer needs: rows, positions and padding."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from palkernels.model.audio_state import AudioState


@dataclass(frozen=True)
class AudioLayout:
    """An :class:`AudioState` spelled out for the rows of one forward: what K/V rows there are and who reads them.

    Rows that share a clip but not its place in the text need their keys rotated differently, so there is one K/V row
    per distinct (audio row, place): P of them, P = A unless such rows exist.
    """

    source: Tensor | None  # (P,) audio row of each K/V row; None: row for row
    positions: Tensor  # (P or 1, N) position of each audio token, as if it stood in the text
    lengths: Tensor | None  # (P,)
    index: Tensor | None  # (B,) K/V row of each text row; None: row for row
    insert_at: Tensor | None  # (B, N); None: before the text
    text_lengths: Tensor  # (B,) valid audio tokens of each text row

    @classmethod
    def of(cls, state: AudioState, copies: int, *, rotated: bool) -> "AudioLayout":
        """``copies`` text rows follow each other for every row of the prompt (beams); ``rotated``: keys take RoPE."""
        device, tokens = state.device, state.num_tokens
        steps = torch.arange(tokens, device=device)
        lengths, index = state.lengths, state.index
        insert_at = None
        if state.insert_at is not None:
            insert_at = state.insert_at.view(state.batch_size, -1).expand(-1, tokens)

        # Token j stands behind insert_at[j] text tokens and j audio tokens.
        source, positions = None, steps.unsqueeze(0)
        if insert_at is not None:
            positions = insert_at + steps
            if index is not None and rotated and torch.compiler.is_compiling():
                source, index = index, None  # how many distinct pairs there are depends on the data
                lengths = None if lengths is None else lengths[source]
            elif index is not None and rotated:
                pairs = torch.cat([index.unsqueeze(1), insert_at], dim=1)
                pairs, index = torch.unique(pairs, dim=0, return_inverse=True)
                source, positions = pairs[:, 0], pairs[:, 1:] + steps
                lengths = None if lengths is None else lengths[source]

        text_lengths = torch.full((state.batch_size,), tokens, device=device)
        if lengths is not None:
            text_lengths = lengths if index is None else lengths[index]
        if copies > 1:
            rows = torch.arange(state.batch_size, device=device) if index is None else index
            index = rows.repeat_interleave(copies)
            text_lengths = text_lengths.repeat_interleave(copies)
            insert_at = None if insert_at is None else insert_at.repeat_interleave(copies, dim=0)
        return cls(source, positions, lengths, index, insert_at, text_lengths)

    def shift(self, text_index: Tensor) -> Tensor:
        """How many audio tokens stand before each text token (B, T), given its place in its row's own text."""
        lengths = self.text_lengths.unsqueeze(1)
        if self.insert_at is None:
            return lengths.expand_as(text_index)
        before = torch.searchsorted(self.insert_at.contiguous(), text_index.contiguous(), right=True)
        return torch.minimum(before, lengths)


@dataclass(frozen=True, eq=False)
class Plan:
    """What the mask and the audio state say about a batch; once every text has begun, the same for later steps."""

    layout: AudioLayout
    start: Tensor  # (B,) first valid key
    length: Tensor  # (B,) valid keys, of which those before ``start`` are none
    text_start: Tensor | None  # ``start``, None where no row is padded on the left
    right_padded: bool
    begun: bool  # whether every row has a valid key (the first chunks of a prompt may be all padding)

    def text_index(self, past: int | Tensor, num_queries: int) -> Tensor:
        """Each query's place in its row's own text (B, T), negative in left padding."""
        return torch.arange(num_queries, device=self.start.device) + past - self.start.unsqueeze(1)

    def positions(self, past: int | Tensor, num_queries: int, *, shifted: bool) -> Tensor:
        """RoPE positions of the text (B, T); ``shifted`` by the audio that stands before it."""
        own = self.text_index(past, num_queries).clamp(min=0)
        if self.right_padded:  # what is not a token must not be the longest position
            own = torch.minimum(own, (self.length - 1).clamp(min=0).unsqueeze(1))
        return own + self.layout.shift(own) if shifted else own


def check_places(state: AudioState, length: Tensor) -> None:
    """The audio must stand in the text or right behind it; ``length`` (B,) in tokens without padding."""
    if state.insert_at is None or torch.compiler.is_compiling():
        return
    places = state.insert_at.view(state.batch_size, -1)
    if bool((places > length.unsqueeze(1)).any()):
        raise ValueError(f"insert_at must be at most each text's length {length.tolist()}, got {places.tolist()}")


def padding(mask: Tensor) -> tuple[Tensor, Tensor, bool, bool]:
    """First valid key (B,) and number of valid keys (B,) of a 2-D mask; whether any row is padded left or right."""
    valid = mask != 0
    length = valid.sum(dim=1)
    # A row without any valid key starts behind its end.
    start = torch.where(length > 0, valid.int().argmax(dim=1), valid.shape[1])
    if torch.compiler.is_compiling() or is_fake(mask):
        return start, length, True, False
    index = torch.arange(valid.shape[1], device=mask.device)
    end = start + length
    block = (index >= start.unsqueeze(1)) & (index < end.unsqueeze(1))
    if bool((block != valid).any()):
        raise ValueError("attention_mask must mark one run of tokens per row with audio, got a mask with holes")
    return start, length, bool((start > 0).any()), bool((end < valid.shape[1]).any())
