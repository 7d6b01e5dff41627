"""What a cache has heard. Audio lies in no text cache, so that a conversation which goes on must find it beside one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from palkernels.model.causal_lm.caches import CACHE_KEYWORDS, cache_of
from palkernels.model.causal_lm.facts import DeviceFacts
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.texts import inputs_of

MEMORY = "_palkernels_memory"  # on a cache: its Memory
SAME = object()


@dataclass(eq=False)
class Memory:
    """The audio of the texts in a cache, each of whose rows continues one of them."""

    state: AudioState | None  # what enters the layers
    rows: Tensor  # (rows of the cache,) the text of each, among those that the audio describes
    tokens: Any = None  # what a whole audio LLM keeps of tokens that enter among the text
    cut_at: int | None = None  # the first column that was cropped off since, and what stood there with it

    def texts(self, batch: int) -> Tensor:
        """Return the text (B,) that each of B texts continues. A cache may have several rows for each of them.

        Raises:
            ValueError: the cache has other texts.
        """
        rows = self.rows.shape[0]
        if not batch or rows % batch:
            raise ValueError(f"audio must be given again: the cache has heard it for {rows} text rows, got {batch}")
        return self.rows[:: rows // batch]

    def state_of(self, batch: int, mask: object = None) -> AudioState | None:
        """Return the audio of B texts, None if none enters the layers: what stands in the text that was not cropped.

        Args:
            batch: B.
            mask: (B, columns) which columns of the conversation are tokens; anything else: all.

        Raises:
            ValueError: the cache has other texts.
        """
        state, texts = self.state, self.texts(batch)
        if state is None:
            return None
        texts = texts.to(state.device)
        index = texts if state.index is None else state.index[texts]
        insert_at = None if state.insert_at is None else state.insert_at[texts]
        heard = AudioState(state.states, state.lengths, index, insert_at)
        if self.cut_at is None or insert_at is None:
            return heard
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return _before(heard, (mask[:, : self.cut_at] != 0).sum(dim=1).to(state.device))
        return _before(heard, torch.full((batch,), self.cut_at, device=state.device))

    def cropped(self, length: int) -> "Memory":
        """Return the memory of a cache that was cropped to ``length`` columns."""
        return replace(self, cut_at=length if self.cut_at is None else min(length, self.cut_at))


def _before(state: AudioState, text: Tensor) -> AudioState | None:
    """Return the audio of texts that stands in front of their token number ``text`` (B,), None where none does."""
    assert state.insert_at is not None
    places = state.insert_at.view(state.batch_size, -1).expand(-1, state.num_tokens)
    lengths = text_lengths(state)
    kept = torch.minimum(lengths, (places < text.unsqueeze(1)).sum(dim=1))
    if bool((kept == lengths).all()):
        return state
    if not bool(kept.any()):
        return None
    states: Any = state.states
    by_layer = not isinstance(states, Tensor)
    chosen = [None if x is None else x[state.index] for x in states] if by_layer else states[state.index]
    return AudioState(chosen, kept, None, state.insert_at)


class RowOperation:
    """What a cache that remembers has in place of a method: its rows are moved, and the memory's with them."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache = cache
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = int(self.cache.get_seq_length()) if self.name == "crop" else 0
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        memory: Memory | None = getattr(self.cache, MEMORY, None)
        if memory is None:
            return result
        if self.name == "reset":
            setattr(self.cache, MEMORY, None)
            return result
        if self.name == "crop":
            length = int(self.cache.get_seq_length())
            if length < before:
                setattr(self.cache, MEMORY, memory.cropped(length) if length else None)
            return result
        argument = next(iter((*args, *kwargs.values())))
        repeat = self.name == "batch_repeat_interleave"
        rows = memory.rows.repeat_interleave(argument) if repeat else memory.rows[argument.to(memory.rows.device)]
        setattr(self.cache, MEMORY, replace(memory, rows=rows))  # a copy of the cache has its own
        return result


def remember(cache: Any, state: AudioState | None, rows: Tensor, tokens: Any = SAME) -> None:
    """Note in a cache what its texts have heard; where that is noted already, what was cropped off is heard again.

    Args:
        cache: the cache; None: nothing is kept.
        state: the audio that enters the layers.
        rows: the text (rows of the cache,) of each row, among those that ``state`` describes.
        tokens: what else is to be kept; as it is where nothing is said.
    """
    if cache is None:
        return
    memory = getattr(cache, MEMORY, None)
    if memory is not None and memory.state is state and (tokens is SAME or memory.tokens is tokens):
        whole_again(cache)
        return  # with the rows as they have been moved since
    setattr(cache, MEMORY, Memory(state, rows, None if tokens is SAME else tokens))
    if torch.compiler.is_compiling():
        return
    for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset"):
        if name not in vars(cache) and hasattr(type(cache), name):
            setattr(cache, name, RowOperation(cache, name))


def whole_again(cache: Any) -> None:
    """Note that a cache's texts hear all that it remembers, whatever was cropped off before."""
    memory: Memory | None = getattr(cache, MEMORY, None)
    if memory is not None and memory.cut_at is not None:
        setattr(cache, MEMORY, replace(memory, cut_at=None))


def forget(cache: Any) -> None:
    """Let a cache that begins another conversation forget what it has heard."""
    if getattr(cache, MEMORY, None) is not None:
        setattr(cache, MEMORY, None)


def memory_of(cache: Any) -> Memory | None:
    """Return what a cache has heard, None where that is nothing or where it is empty."""
    memory: Memory | None = getattr(cache, MEMORY, None)
    if memory is None:
        return None
    count = cache.get_seq_length()
    return None if isinstance(count, int) and count == 0 else memory


def recalled(arguments: Mapping[str, Any]) -> AudioState | None:
    """Return the audio that the cache among a forward's arguments has heard, for its texts; None if there is none.

    Raises:
        ValueError: the cache has other texts.
    """
    memory = memory_of(cache_of(arguments))
    return None if memory is None else memory.state_of(inputs_of(arguments).shape[0], arguments.get("attention_mask"))


def check_complete(arguments: Mapping[str, Any], state: AudioState) -> None:
    """Check that the audio of a conversation that goes on is all that its cache, among the arguments of a generate
    call, has heard, or more. Reads values once.

    Raises:
        ValueError: some text is given less.
    """
    memory = memory_of(cache_of(arguments))
    heard = None if memory is None else memory.state_of(state.batch_size, arguments.get("attention_mask"))
    if heard is None or heard is state:
        return
    given, known = text_lengths(state), text_lengths(heard).to(state.device)
    facts = DeviceFacts()
    facts.ask("less", (given < known).any())
    if (facts.read() or {}).get("less"):
        raise ValueError(
            f"audio must be all that the conversation has heard, {known.tolist()} tokens of its texts, or be left out, "
            f"got {given.tolist()}"
        )


def text_lengths(state: AudioState) -> Tensor:
    """Return the valid audio tokens of each text (B,)."""
    lengths = state.lengths
    if lengths is None:
        lengths = torch.full((state.num_rows,), state.num_tokens, device=state.device)
    return lengths if state.index is None else lengths[state.index]


def cache_after(cache: Any, outputs: Any) -> Any:
    """Return the cache of a forward, given the one that it was called with: that, or the one among its outputs."""
    if cache is not None:
        return cache
    if isinstance(outputs, tuple):
        return next((output for output in outputs if isinstance(output, Cache)), None)
    return outputs.get(CACHE_KEYWORDS[0])  # asked for the older name, too, transformers would warn


def text_rows(batch: int, copies: int, device: torch.device) -> Tensor:
    """Return the text of each row (batch,), where ``copies`` rows follow each other for every text."""
    return torch.arange(batch // copies, device=device).repeat_interleave(copies)
