"""``generate`` of an audio LLM: audio is encoded once, and every forward gets what its columns and its texts need."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from palkernels.model.causal_lm.caches import cache_of
from palkernels.model.causal_lm.generation import generating, prompt_of
from palkernels.model.causal_lm.memory import Memory, forget, memory_of, remember, text_rows, whole_again
from palkernels.model.causal_lm.texts import inputs_of
from palkernels.model.pal.hearing import Hearing, Kept, Step, check_placeholders, recall
from palkernels.model.pal.inputs import AudioInputs
from palkernels.model.pal.listening import Listener
from palkernels.model.pal.placeholders import Placeholders, place_of

__all__ = ["LISTEN", "STEP", "current", "generation_of"]

# Keywords of forward within this package: to listen without running the language model, and a forward's audio.
LISTEN = "palkernels_listen"
STEP = "palkernels_step"
# Options that this class cannot serve, with or without audio.
REFUSED = {
    "assistant_early_exit": "an audio LLM does not leave its language model early",
    "use_mtp": "an audio LLM has no layers that predict several tokens",
}
# Options with which others would make forwards that see no audio.
REFUSED_WITH_AUDIO = {"token_healing": "the prompt would be generated anew without its audio"}

# The generate call under way in this thread. Not a keyword of generate's: transformers would hand it to an assistant.
_CURRENT: ContextVar["PalGeneration | None"] = ContextVar("palkernels_pal_generation", default=None)


class PalGeneration:
    """One generate call.

    Args:
        model: the model.
        hearing: what the prompt's texts hear.
        placeholders: those of the prompt; None where no audio enters by PLITS.
        start: the columns that are in the cache already.
    """

    def __init__(self, model: Listener, hearing: Hearing, placeholders: Placeholders | None, start: int = 0) -> None:
        self.model = model
        self.hearing = hearing
        self.kept = None if placeholders is None else Kept(hearing.tokens, placeholders)
        self.memory: Memory | None = None  # what the cache of the forwards remembers
        self.cache: Any = None
        # What models that draft for this one hear, by their id: they are called without audio.
        self.assistants: dict[int, tuple[Hearing, Placeholders | None]] = {}
        self._numbers: Tensor | None = None  # (B, columns)
        self._columns: list[bool] = []  # whether any text has a placeholder there
        if placeholders is not None and hearing.tokens is not None:
            self._numbers = placeholders.numbers().to(hearing.tokens.states.device)
            self._columns = (self._numbers >= 0).any(dim=0).tolist()
        self._complete = False  # whether the prompt has run
        self.placed = not any(self._columns[start:])  # whether placeholders that run now have been replaced
        self.whole: int | None = None  # the prompt's columns where a draft continues a cache by the whole conversation

    def new_columns(self, input_ids: Tensor, cache: Any) -> int | None:
        """Return how many of the last columns must run where transformers does not say: a draft's first forward would
        run the columns in the cache again."""
        if self.whole is None or cache is None or input_ids.shape[1] < self.whole:
            return None
        cached = int(cache.get_seq_length())
        return input_ids.shape[1] - cached if cached else None

    def prepare(self, arguments: dict[str, Any]) -> None:
        """Add its audio to one forward's arguments, as the language model's own preparation returned them."""
        inputs = inputs_of(arguments)
        batch, count = inputs.shape[:2]
        cache = cache_of(arguments)
        audio = arguments.pop("audio", None)
        if self.hearing.present and (self.memory is None or cache is not self.cache):
            texts = self._texts(batch)
            self.memory = Memory(self.hearing.state, text_rows(batch, batch // texts, inputs.device), self.kept)
            remember(cache, self.memory.state, self.memory.rows, self.kept)
            self.cache = cache
        tokens = numbers = None
        first = self._first_column(cache)
        if first is not None:
            self._complete = first + count >= len(self._columns)
            if any(self._columns[first : first + count]):
                tokens, numbers = self._in_place(first, count, batch)
                self.placed = True
        arguments[STEP] = Step(tokens, numbers, audio, self.memory)

    def _texts(self, batch: int) -> int:
        """Return the number of texts in the prompt, which has as many rows for each."""
        texts = self.hearing.texts
        if not texts or batch % texts:
            raise ValueError(f"audio must describe the prompt's rows, got {texts} for {batch} text rows")
        return texts

    def _first_column(self, cache: Any) -> int | None:
        """Return the first column that runs now; None where it is known to be behind the prompt, without counting."""
        if self._numbers is None:
            return None
        cached = 0 if cache is None else cache.get_seq_length()
        if isinstance(cached, int):
            return cached
        return None if self._complete else int(cached)  # counted on the device

    def _in_place(self, first: int, count: int, batch: int) -> tuple[Tensor, Tensor]:
        """Return PLITS tokens and the numbers of those that take the places of columns, for each row."""
        assert self._numbers is not None
        assert self.hearing.tokens is not None
        numbers = self._numbers[:, first : first + count]
        numbers = torch.nn.functional.pad(numbers, (0, count - numbers.shape[1]), value=-1)
        copies = batch // numbers.shape[0]
        tokens = self.hearing.tokens.states
        if copies == 1:
            return tokens, numbers
        return tokens.repeat_interleave(copies, dim=0), numbers.repeat_interleave(copies, dim=0)


def current(model: Listener) -> PalGeneration | None:
    """Return the generate call that this model is in, if any."""
    generation = _CURRENT.get()
    return generation if generation is not None and generation.model is model else None


@contextmanager
def generation_of(model: Listener, audio: AudioInputs, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Prepare every forward of a generate call, whose ``arguments`` are by name, with its audio.

    Raises:
        TypeError, ValueError: the audio does not fit the prompt, or an option cannot be served.
        RuntimeError: no forward took the audio.
    """
    audio.check()
    _check_options(model, arguments)
    outer = _CURRENT.get()
    known = None if outer is None or audio.has_clips else outer.assistants.get(id(model))
    hearing, placeholders = known or _listen(model, audio, arguments)
    generation = PalGeneration(model, hearing, placeholders, _cached(arguments))
    generation.whole = _whole_of_draft(model, arguments)
    if hearing.present:
        _check_options_with_audio(model, arguments)
        _prepare_assistant(generation, audio, arguments)
    elif not _cached(arguments):
        forget(cache_of(arguments))
    token = _CURRENT.set(generation)
    inner = None
    try:
        handle = model.attached()
        if handle is None:
            yield
        else:
            with generating(handle, hearing.state, arguments) as inner:
                yield
    finally:
        _CURRENT.reset(token)
        whole_again(generation.cache)  # drafts are cropped off, behind which no audio stands
    deaf = inner is not None and (inner.request is None or not inner.request.ran)
    if deaf or not (generation.placed or known):
        raise RuntimeError(
            "no forward of this generate took the audio: generate must call the model with all that its "
            "prepare_inputs_for_generation returns"
        )


def _cached(arguments: Mapping[str, Any]) -> int:
    """Return the columns in the cache that a generate call continues."""
    cache = cache_of(arguments)
    return 0 if cache is None else int(cache.get_seq_length())


def _first_column(arguments: Mapping[str, Any]) -> int:
    """Return the column of a prompt's first token: 0 where it is the whole conversation, more where the mask is longer,
    and the ids are the new tokens."""
    mask, prompt = arguments.get("attention_mask"), cast(Tensor, prompt_of(arguments))
    if not isinstance(mask, Tensor) or mask.ndim != 2 or arguments.get("inputs_embeds") is not None:
        return 0
    return max(int(mask.shape[1] - prompt.shape[1]), 0)


def _whole_of_draft(model: Listener, arguments: Mapping[str, Any]) -> int | None:
    """Return the prompt's columns where a draft continues a cache by the whole conversation, else None.

    Raises:
        ValueError: it continues the cache by new tokens, and transformers would cut what belongs to the earlier ones.
    """
    drafts = ("assistant_model", "prompt_lookup_num_tokens")
    name = next((name for name in drafts if _option(model, arguments, name)), None)
    if name is None or not _cached(arguments):
        return None
    if _first_column(arguments):
        raise ValueError(f"input_ids must be the whole conversation where {name} continues a cache, got its new tokens")
    prompt = prompt_of(arguments)
    return int(prompt.shape[1])


def _listen(model: Listener, audio: AudioInputs, arguments: Mapping[str, Any]) -> tuple[Hearing, Placeholders | None]:
    """Return what the prompt's texts hear, and the placeholders of the whole conversation."""
    prompt = prompt_of(arguments)
    if not isinstance(prompt, Tensor) or prompt.ndim < 2:
        if audio.has_clips:
            raise ValueError("generate must be given a prompt with audio: input_ids or inputs_embeds of (B, T, ...)")
        return Hearing(), None  # the stock generate begins with the BOS token, or says what is missing
    embeds, cache = arguments.get("inputs_embeds"), cache_of(arguments)
    inputs = arguments.get("inputs")
    ids = arguments.get("input_ids") if inputs is None else inputs
    batch, start, first = prompt.shape[0], _cached(arguments), _first_column(arguments)
    memory = memory_of(cache) if start else None
    hearing, earlier = (Hearing(), None) if memory is None else recall(memory, batch, arguments.get("attention_mask"))
    before = earlier if first > 0 else None
    if audio.has_clips:
        so_far = None if before is None else before.up_to(first).counts()
        hearing, places = cast(Any, model)(input_ids=ids, inputs_embeds=embeds, **vars(audio), **{LISTEN: (so_far,)})
    else:
        places = None if ids is None or embeds is not None else model.places(ids, None)
    if places is None:
        if memory is None and not audio.has_clips:
            model.warn_of_marks(ids)
        return hearing, None
    if hearing.tokens is not None:
        places = places.to(hearing.tokens.lengths.device)
    placeholders = Placeholders.following(before, first, places)
    if hearing.tokens is not None and first > 0 and before is None:
        # Of a cache that remembers nothing, it is known that the texts end with the last clips.
        placeholders = placeholders.completing(hearing.tokens.lengths)
    new = placeholders.table[:, start:]
    tokens, where = hearing.tokens, place_of(ids, embeds)
    if tokens is not None and not audio.has_clips and bool((placeholders.counts() > tokens.lengths).any()):
        raise ValueError(f"audio must be given for {int(new.sum())} placeholders in {where}, got none")
    check_placeholders(model.config.audio_token_id, tokens, placeholders, new, None, complete=True, where=where)
    return hearing, placeholders


def _prepare_assistant(generation: PalGeneration, audio: AudioInputs, arguments: Mapping[str, Any]) -> None:
    """Let an assistant that is an audio LLM hear the same clips: it is called without them."""
    assistant = arguments.get("assistant_model")
    get_base = getattr(assistant, "get_base_model", None)  # peft's
    assistant = assistant if get_base is None else get_base()
    if not isinstance(assistant, type(generation.model)):
        return
    placeholders = None if generation.kept is None else generation.kept.placeholders
    if assistant is generation.model:
        generation.assistants[id(assistant)] = generation.hearing, placeholders
        return
    if audio.input_features is None:
        raise ValueError("input_features must be given for an assistant_model that is an audio LLM, got none")
    if arguments.get("assistant_tokenizer") is not None:
        raise ValueError("assistant_tokenizer must be None with audio where assistant_model is an audio LLM")
    try:
        generation.assistants[id(assistant)] = _listen(assistant, audio, arguments)
    except ValueError as error:
        raise ValueError(f"assistant_model must be able to hear the prompt's audio, but {error}") from error


def _option(model: Listener, arguments: Mapping[str, Any], name: str) -> Any:
    """Return an option of a generate call: from its keywords, its configuration or the model's."""
    if arguments.get(name) is not None:
        return arguments[name]
    config = arguments.get("generation_config")
    return getattr(model.generation_config if config is None else config, name, None)


def _check_options(model: Listener, arguments: Mapping[str, Any]) -> None:
    """Refuse options that cannot be served."""
    for name, reason in REFUSED.items():
        if _option(model, arguments, name):
            raise ValueError(f"{name} must not be given: {reason}")
    if _option(model, arguments, "cache_implementation") == "paged":
        raise ValueError('cache_implementation must not be "paged": continuous batching takes no audio')
    peft = getattr(model.language_model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        raise ValueError(f"language_model must have no learnt prompt in generate, got {type(peft).__name__}")


def _check_options_with_audio(model: Listener, arguments: Mapping[str, Any]) -> None:
    """Refuse options that cannot be served with audio."""
    for name, reason in REFUSED_WITH_AUDIO.items():
        if _option(model, arguments, name):
            raise ValueError(f"{name} must not be given with audio: {reason}")
