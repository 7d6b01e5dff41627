"""From an attention mask and an :class:`AudioState` to what every layer needs: rows, positions and padding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from palkernels.model.causal_lm.state import AudioState


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


def texts_of(arguments: dict[str, Any]) -> Tensor:
    """A forward's texts, input_ids (B, T) or inputs_embeds (B, T, d)."""
    ids = arguments.get("input_ids")
    inputs: Tensor | None = arguments.get("inputs_embeds") if ids is None else ids
    if inputs is None:
        raise ValueError("a forward with audio must be given input_ids or inputs_embeds, got neither")
    if inputs.ndim < 2 or 0 in inputs.shape[:2]:
        raise ValueError(
            f"a forward with audio must be given texts (B, T), B and T >= 1, got shape {tuple(inputs.shape)}"
        )
    return inputs


def make_plan(
    state: AudioState,
    copies: int,
    arguments: dict[str, Any],
    batch: int,
    past: int | Tensor,
    num_queries: int,
    device: torch.device,
    *,
    rotated: bool,
    training: bool,
) -> Plan:
    """Check what a forward was given, and work out what its mask and state mean. ``copies`` and ``rotated`` are those
    of :meth:`AudioLayout.of`; ``past`` text keys are in the cache."""
    if batch != copies * state.batch_size:
        raise ValueError(f"audio must describe the batch's {batch} text rows, got {state.batch_size}")
    mask = arguments.get("attention_mask")
    start = torch.zeros(batch, dtype=torch.long, device=device)
    length = torch.zeros_like(start) + past + num_queries
    left_padded = right_padded = False
    if mask is not None:
        mask = _text_mask(mask, batch, past, num_queries)
        start, length, left_padded, right_padded = padding(mask)
    no_text_follows = training or arguments.get("use_cache") is False
    if no_text_follows and copies == 1:  # generate has checked its prompt
        check_places(state, length)

    layout = AudioLayout.of(state, copies, rotated=rotated)
    begun = mask is None or (not torch.compiler.is_compiling() and bool((length > 0).all()))
    plan = Plan(layout, start, length, start if left_padded else None, right_padded, begun)

    given = arguments.get("position_ids")
    if given is not None and not torch.compiler.is_compiling():
        own = plan.text_index(past, num_queries)
        counted = (own >= 0) & (own < length.unsqueeze(1))
        fits = isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == num_queries
        if not fits or given.shape[0] not in (1, batch) or bool(((given != own) & counted).any()):
            what = given.tolist() if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                "position_ids must count each row's own text from 0 with audio, (B, T) (packed sequences are not "
                f"supported), got {what}"
            )
    return plan


def _text_mask(mask: object, batch: int, past: int | Tensor, num_queries: int) -> Tensor:
    """The mask's columns up to the last query; it may be longer where the cache is preallocated."""
    preallocated = isinstance(past, Tensor)
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch
    if fits and preallocated and torch.compiler.is_compiling():
        return mask  # type: ignore[return-value]  # how many columns are in use is not known
    total = int(past) + num_queries
    if not fits or not (mask.shape[1] == total or (preallocated and mask.shape[1] > total)):  # type: ignore[attr-defined]
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be 2-D with audio, (B, past + T) = {(batch, total)}, got {got}")
    columns: Tensor = mask[:, :total]  # type: ignore[index]
    return columns
