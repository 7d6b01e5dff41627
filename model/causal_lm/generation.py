"""``generate`` of an attached model: audio is projected once, and every step is prepared before the model runs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palkernels.model.causal_lm.attached import Attached
from palkernels.model.causal_lm.caches import cache_of, without_cache
from palkernels.model.causal_lm.memory import check_complete, recalled, remember, text_lengths, text_rows, whole_again
from palkernels.model.causal_lm.plan import check_prompt
from palkernels.model.causal_lm.request import Carried, Request
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.texts import Texts, count_cached, inputs_of

# The generate call under way in this thread. Not a keyword of generate's: transformers would hand it to an assistant.
_CURRENT: ContextVar["Generation | None"] = ContextVar("palkernels_generation", default=None)


class Generation:
    """One generate call with audio.

    Args:
        handle: of the attached model.
        state: the caller's audio.
        prompt: the prompt's columns.
    """

    def __init__(self, handle: Attached, state: AudioState, prompt: int) -> None:
        self.handle = handle
        self.state = state
        self.prompt = prompt
        self.unchecked: int | None = prompt  # None once the whole prompt has been checked
        self.request: Request | None = None  # of the last forward
        self.cache: Any = None  # that remembers the audio
        self.settled = False  # whether compiled steps know where the audio's K and V are
        # Positions behind which RoPE changes, where audio counts for it, and those of the prompt's longest row.
        shifted = getattr(getattr(handle, "config", None), "rope", None) == "sequence"
        self.limit = handle.rotary.changes_behind if shifted else None
        self.longest = 0

    def copies(self, batch: int) -> int:
        """Return how many texts there are per text of the prompt: beams and returned sequences follow each other."""
        if not self.state.batch_size or batch % self.state.batch_size:
            raise ValueError(
                f"audio must describe the prompt's rows, got {self.state.batch_size} for {batch} text rows"
            )
        return batch // self.state.batch_size

    def whole_where_rope_changes(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments for preparing a step; without the cache where its keys have other RoPE frequencies.

        So does Phi-3's own preparation, which counts the text alone.

        Raises:
            ValueError: the whole text would have to run again, and is not there.
        """
        limit, cache, ids = self.limit, cache_of(arguments), arguments["input_ids"]
        cached = 0 if limit is None or cache is None else int(cache.get_seq_length())
        if limit is None or not cached:
            return arguments
        columns = cached + (arguments.get("next_sequence_length") or ids.shape[1])
        before, now = (self.longest - self.prompt + count for count in (cached, columns))
        if (before > limit) == (now > limit):
            return arguments
        if ids.shape[1] != columns:
            raise ValueError(
                f"input_ids must be the whole text where RoPE changes, behind {limit} positions of text and audio, got "
                f"{ids.shape[1]} of {columns} tokens (as by prefill_chunk_size or inputs_embeds)"
            )
        return without_cache(arguments)

    def prepare(self, arguments: dict[str, Any], mask: Tensor | None) -> None:
        """Turn one forward's arguments into those with audio; ``mask`` (B, keys so far) is from before it was 4-D.

        Values on the device are read where a plan is made, and where the prompt is whole: not in later steps.
        """
        batch = inputs_of(arguments).shape[0]
        copies = self.copies(batch)
        prompt = self._prompt_that_is_whole(mask)
        texts = Texts.of({**arguments, "attention_mask": mask}, copies, prompt)
        request = self.request
        if request is None or not request.plan.begun or self._frequencies_change(texts):
            request = self.handle.request(self.state, texts, keep=True)
            self.settled = False
        else:
            if prompt is not None:
                check_prompt(self.state, texts)
            request = request.following(texts)
        if prompt is not None:
            self.unchecked = None
        arguments["position_ids"] = request.positions()
        self.request = request
        arguments["audio"] = Carried(request)
        cache = cache_of(arguments)
        if cache is not self.cache:
            remember(cache, self.state, text_rows(batch, copies, texts.device))
            self.cache = cache
        if request.cached and not self.settled and getattr(cache, "is_compileable", False):
            settle(request.cached.values())
            self.settled = True

    def _prompt_that_is_whole(self, mask: Tensor | None) -> int | None:
        """Return the prompt's columns if this forward completes it: a prompt may come in chunks.

        The mask is looked at only now, since transformers infers one from padding tokens where there is none.
        """
        if isinstance(mask, Tensor) and self.unchecked is not None and mask.shape[-1] < self.unchecked:
            return None
        return self.unchecked

    def _frequencies_change(self, texts: Texts) -> bool:
        """Return whether what is cached may no longer hold: Phi-3 drops its cache where its frequencies change."""
        no_cache = isinstance(texts.num_cached, int) and texts.num_cached == 0
        return self.handle.rotary.depends_on_length and no_cache


def settle(kept: Iterable[Sequence[Tensor]]) -> None:
    """Say that K and V stay where they are, as static caches do of theirs: a step that is a CUDA graph would copy them
    into memory of its own every time."""
    for key_value in kept:
        for tensor in key_value:
            torch._dynamo.mark_static_address(tensor)


def check_unchanged(request: Request, arguments: dict[str, Any]) -> None:
    """Check that what runs is as long as what was prepared.

    Raises:
        RuntimeError: it is not.
    """
    prepared = request.texts.num_keys
    if not isinstance(prepared, int):
        return  # counted on the device
    inputs = inputs_of(arguments)
    num_keys = count_cached(cache_of(arguments), inputs.device) + inputs.shape[1]
    if num_keys != prepared:
        raise RuntimeError(
            f"a forward with audio must run the text that was prepared, {prepared} tokens with the cached ones, "
            f"got {num_keys}: somebody adds to it (peft's prompt learning does)"
        )


def current(model: PreTrainedModel) -> Generation | None:
    """Return the generate call with audio that this model is in, if any."""
    generation = _CURRENT.get()
    return generation if generation is not None and generation.handle.model is model else None


def generate(handle: Attached, audio: AudioState | None, arguments: dict[str, Any]) -> Any:
    """Run the stock generate, every forward of it prepared with the audio; ``arguments`` by name.

    Without ``audio``, a conversation that goes on hears what its cache has heard.

    Raises:
        TypeError, ValueError: the audio does not fit the prompt.
        RuntimeError: somebody has replaced what prepares the forwards, so that they would run without audio.
    """
    if audio is None and prompt_of(arguments) is not None:
        audio = recalled({**arguments, "inputs_embeds": None, "input_ids": prompt_of(arguments)})
    with generating(handle, audio, arguments) as generation:
        outputs = handle.stock("generate")(**arguments)
    if generation is not None and (generation.request is None or not generation.request.ran):
        raise RuntimeError(
            "no forward of this generate took the audio: generate must call the model with all that its "
            "prepare_inputs_for_generation returns"
        )
    return outputs


@contextmanager
def generating(handle: Attached, audio: AudioState | None, arguments: Mapping[str, Any]) -> Iterator[Generation | None]:
    """Prepare every forward of a generate call, whose ``arguments`` are by name; yield None where it has no audio.

    Raises:
        TypeError, ValueError: the audio does not fit the prompt.
        RuntimeError: somebody has replaced what prepares the forwards.
    """
    generation = None
    if audio is not None:
        prompt = _prompt_columns(audio, arguments)
        check_complete(arguments, audio)
        prepare = handle.model.prepare_inputs_for_generation
        if getattr(prepare, "__func__", None) is type(handle.model).prepare_inputs_for_generation:
            raise RuntimeError(
                "prepare_inputs_for_generation must be the one that attach made, got the stock one, which somebody has "
                "put back (peft's prompt learning does): detach and attach again"
            )
        generation = Generation(handle, audio, prompt)
        if generation.limit is not None:
            mask = arguments.get("attention_mask")
            text = (mask != 0).sum(dim=1) if isinstance(mask, Tensor) and mask.ndim == 2 else prompt
            generation.longest = int((text_lengths(audio) + text).max())
    token = _CURRENT.set(generation)  # None too: an assistant's own call sees the text only
    try:
        yield generation
    finally:
        _CURRENT.reset(token)
        if generation is not None:
            whole_again(generation.cache)  # drafts are cropped off, behind which no audio stands


def prompt_of(arguments: Mapping[str, Any]) -> Any:
    """Return a generate call's prompt, None if it has none."""
    prompts = (arguments.get(name) for name in ("inputs_embeds", "inputs", "input_ids"))  # in generate's own order
    prompt: Any = next((prompt for prompt in prompts if prompt is not None), None)
    return prompt


def _prompt_columns(audio: AudioState, arguments: Mapping[str, Any]) -> int:
    """Check the shapes of a prompt, and return its columns, padding and cached ones included."""
    if not isinstance(audio, AudioState):
        raise TypeError(f"audio must be an AudioState, got {type(audio).__name__}")
    config = arguments.get("generation_config")
    if arguments.get("assistant_early_exit") or getattr(config, "assistant_early_exit", None):
        raise ValueError("assistant_early_exit must be None with audio: its first layers would not see the audio")
    prompt = prompt_of(arguments)
    if not isinstance(prompt, Tensor) or prompt.ndim < 2:
        raise ValueError("generate must be given a prompt with audio: input_ids or inputs_embeds of (B, T, ...)")
    if prompt.shape[0] != audio.batch_size:
        raise ValueError(f"audio must describe the prompt's {prompt.shape[0]} rows, got {audio.batch_size}")
    mask = arguments.get("attention_mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else prompt.shape[1]
