"""What the texts of a batch hear, made once for a forward or a generate call, and what one forward takes of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from palkernels.model.causal_lm.audio_parts import tied, zero
from palkernels.model.causal_lm.facts import DeviceFacts
from palkernels.model.causal_lm.memory import Memory, remember
from palkernels.model.causal_lm.request import Carried
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.pal.clips import Clips
from palkernels.model.pal.placeholders import Placeholders, mismatch, put_in_place

__all__ = ["IGNORED", "Hearing", "Kept", "Step", "check_placeholders", "labels_of", "recall", "step_of"]

IGNORED = -100  # a label that the loss passes over


@dataclass(frozen=True, eq=False)
class Hearing:
    """The audio of B texts, ready for the language model."""

    tokens: Clips | None = None  # (B, N, d) that take the places of each text's placeholders
    state: AudioState | None = None  # what enters the layers

    @property
    def present(self) -> bool:
        """Whether there is any audio."""
        return self.tokens is not None or self.state is not None

    @property
    def texts(self) -> int:
        """The number of texts, B; 0 where there is no audio."""
        if self.state is not None:
            return self.state.batch_size
        return 0 if self.tokens is None else self.tokens.lengths.shape[0]


@dataclass(frozen=True, eq=False)
class Kept:
    """What a cache keeps of PLITS tokens, for the texts that its memory describes."""

    tokens: Clips | None
    placeholders: Placeholders | None


def recall(memory: Memory, batch: int, mask: Tensor | None) -> tuple[Hearing, Placeholders | None]:
    """Return what B texts that continue a cache have heard, without what was cropped off, and their placeholders as
    far as they are known.

    Args:
        mask: (B, columns) the tokens of the whole conversation; None: all columns.

    Raises:
        ValueError: The cache has other texts.
    """
    texts = memory.texts(batch)
    state, kept = memory.state_of(batch, mask), memory.tokens
    if not isinstance(kept, Kept):
        return Hearing(None, state), None
    tokens = kept.tokens
    if tokens is not None:
        texts = texts.to(tokens.lengths.device)
        tokens = Clips(tokens.states[texts], tokens.lengths[texts])
    placeholders = None if kept.placeholders is None else kept.placeholders.rows(texts)
    if memory.cut_at is not None and placeholders is not None:
        placeholders = placeholders.up_to(memory.cut_at)
        if tokens is not None:
            left = torch.minimum(tokens.lengths, placeholders.counts().to(tokens.lengths.device))
            tokens = Clips(tokens.states, left) if bool(left.any()) else None
    return Hearing(tokens, state), placeholders


class Step:
    """One forward's audio. It is no dataclass: FSDP2 would look into it and copy it.

    Args:
        tokens: (B, N, d) PLITS tokens, where this forward has placeholders.
        numbers: (B, T) the token that takes each place, -1 where the text stays.
        audio: What enters the layers.
        memory: What the cache is to remember.
    """

    def __init__(
        self,
        tokens: Tensor | None = None,
        numbers: Tensor | None = None,
        audio: AudioState | Carried | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.tokens = tokens
        self.numbers = numbers
        self.audio = audio
        self.memory = memory

    def texts(self, embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Any]:
        """Return the language model's arguments: text, with PLITS tokens in their places, and what enters the layers.

        Raises:
            ValueError: There is no text.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        arguments: dict[str, Any] = {} if self.audio is None else {"audio": self.audio}
        if self.tokens is not None and self.numbers is not None:
            embeds = embedding(input_ids) if inputs_embeds is None else inputs_embeds
            return arguments | {"inputs_embeds": put_in_place(embeds, self.numbers, self.tokens)}
        if inputs_embeds is not None:
            return arguments | {"inputs_embeds": inputs_embeds}
        return arguments | {"input_ids": input_ids}

    def trained_texts(
        self,
        embedding: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        parts: Iterable[nn.Module],
        ways: int,
    ) -> dict[str, Any]:
        """Return what :meth:`texts` does, in training: parts that only audio passes get a gradient, if of zeros.

        DDP and FSDP2 wait for the gradient of every parameter that trains, also where a batch is without audio.

        Args:
            parts: encoders, connectors and the layers' own parts.
            ways: in how many ways audio enters, among the text and within the layers.
        """
        arguments = self.texts(embedding, input_ids, inputs_embeds)
        entered = [audio for audio in (self.tokens, self.audio) if getattr(audio, "requires_grad", False)]
        if len(entered) == ways or not torch.is_grad_enabled():
            return arguments
        return tied(arguments, zero(parameter for part in parts for parameter in part.parameters()), embedding)

    def keep(self, cache: Any) -> None:
        """Let the cache of this forward remember what its texts have heard."""
        if self.memory is not None:
            remember(cache, self.memory.state, self.memory.rows, self.memory.tokens)


def check_placeholders(
    token: int | None,
    tokens: Clips | None,
    placeholders: Placeholders,
    new: Tensor,
    labels: Tensor | None,
    *,
    complete: bool,
    where: str = "input_ids",
) -> bool:
    """Check placeholders against PLITS tokens and labels. Reads values on the device once.

    Args:
        token: The placeholder.
        tokens: Of each text; None: there is no audio.
        placeholders: All up to here.
        new: (B, T) those among the new tokens.
        labels: (B, T), or None.
        complete: Whether the texts must have a placeholder for every token; else more may follow.
        where: The argument that holds the placeholders.

    Returns:
        Whether there are new placeholders; True where values cannot be read.

    Raises:
        ValueError: They do not fit each other.
    """
    facts, counts = DeviceFacts(), placeholders.counts()
    facts.ask("new", new.sum())
    if labels is not None and labels.shape == new.shape:
        facts.ask("labelled", (new & (labels != IGNORED)).any())
    if tokens is not None:
        facts.ask("more", (counts > tokens.lengths).any())
        facts.ask("fewer", (counts < tokens.lengths).any())
    known = facts.read()
    if known is None:
        return True
    if known["new"] and tokens is None:
        raise ValueError(f"audio must be given for {known['new']} placeholders in {where}, got none")
    if tokens is not None and (known["more"] or (complete and known["fewer"])):
        raise mismatch(token, tokens, counts, where)
    if known.get("labelled"):
        raise ValueError(
            f"labels must be {IGNORED} at placeholders, got others: labels.masked_fill(input_ids == {token}, {IGNORED})"
            ", since whoever counts or smooths labels outside the model sees them"
        )
    return bool(known["new"])


def step_of(
    hearing: Hearing,
    earlier: Placeholders | None,
    start: int | Tensor,
    places: Tensor,
    labels: Tensor | None,
    token: int | None,
    *,
    complete: bool,
    where: str,
) -> Step:
    """Return the audio of one forward whose new columns may be placeholders.

    Args:
        hearing: What the texts hear.
        earlier: Placeholders of the columns in the cache, or of more; None: they are not known.
        start: Columns in the cache; a tensor only under ``torch.compile``.
        places: (B, T) which of the new columns are placeholders.
        labels: (B, T), or None.
        token: The placeholder.
        complete: Whether the texts must have a placeholder for every PLITS token.
        where: The argument that holds the placeholders.

    Raises:
        ValueError: Placeholders, PLITS tokens and labels do not fit each other.
    """
    tokens = hearing.tokens
    if isinstance(start, Tensor):
        before = earlier.up_to(start).counts() if earlier is not None else places.new_zeros(places.shape[:1]).long()
        placeholders = Placeholders(places, before)
    else:
        placeholders = Placeholders.following(earlier, start, places)
        if earlier is None and start and tokens is not None:
            placeholders = placeholders.completing(tokens.lengths)
    new = check_placeholders(token, tokens, placeholders, places, labels, complete=complete, where=where)
    memory = None
    if not isinstance(start, Tensor) and hearing.present:
        kept = earlier if not new and earlier is not None and earlier.table.shape[1] <= start else placeholders
        memory = Memory(hearing.state, torch.arange(places.shape[0], device=places.device), Kept(tokens, kept))
    if not new or tokens is None:
        return Step(audio=hearing.state, memory=memory)
    return Step(tokens.states, placeholders.numbers()[:, -places.shape[1] :], hearing.state, memory)


def labels_of(labels: Tensor | None, shifted: Tensor | None) -> Tensor | None:
    """Return the labels (B, T) that the loss counts: where some come already shifted, those, by their own tokens.
    Those of a part of the positions (``logits_to_keep``) are not told by their own tokens: then the others are it."""
    if shifted is None or (labels is not None and labels.shape != shifted.shape):
        return labels
    return torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=IGNORED)
