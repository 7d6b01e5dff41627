"""``generate`` of an attached model: audio is projected once, and every step is prepared before the model runs."""

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palkernels.model.causal_lm.layers import AudioKV, Rotation
from palkernels.model.causal_lm.plan import Plan, check_places, padding
from palkernels.model.causal_lm.state import AudioState

if TYPE_CHECKING:
    from palkernels.model.causal_lm.attach import LalHandle
    from palkernels.model.causal_lm.attention import Request

# The generate call under way in this thread. Not a keyword of generate's: transformers would hand it to an assistant.
_CURRENT: ContextVar["Generation | None"] = ContextVar("palkernels_generation", default=None)


class Generation:
    """One generate call: the caller's state, and what is worked out once and kept until the call ends."""

    def __init__(self, handle: "LalHandle", state: AudioState, unread: int | None) -> None:
        self.handle = handle
        self.state = state
        self.unread = unread  # the prompt's columns until its mask has been checked, None once it has
        self.request: Request | None = None  # of the last forward
        self.plan: Plan | None = None
        self.rotations: tuple[Rotation | None, ...] = ()
        self.cached: dict[int, AudioKV] = {}

    def copies(self, batch: int) -> int:
        """Text rows per row of the prompt: beams and returned sequences follow each other."""
        if not self.state.batch_size or batch % self.state.batch_size:
            raise ValueError(
                f"audio must describe the prompt's rows, got {self.state.batch_size} for {batch} text rows"
            )
        return batch // self.state.batch_size

    def prepare(self, arguments: dict[str, Any], mask: Tensor | None) -> None:
        """Turn one forward's arguments into those with audio; ``mask`` (B, keys so far), before it was made 4-D."""
        inputs = next(arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None)
        batch, num_queries = inputs.shape[:2]
        past = keys_in(arguments.get("past_key_values"), inputs.device)
        self._check_inferred(mask, batch)
        if self.handle.rotary.depends_on_length and isinstance(past, int) and past == 0:
            self.plan, self.cached = None, {}  # Phi-3 drops its cache where its frequencies change
        if self.plan is None or not self.plan.begun:
            handle, given = self.handle, {**arguments, "attention_mask": mask}
            self.plan = handle.plan(self.state, self.copies(batch), given, batch, past, num_queries, inputs.device)
            self.rotations = handle.rotations(self.state, self.plan, past, num_queries)
        if mask is not None and num_queries > 1:  # a prompt, a later chunk of it, or a draft
            *_, right_padded = padding(mask)
            if right_padded:
                raise ValueError("generate must be given a prompt without right padding: pad on the left")
        arguments["position_ids"] = self.handle.positions(self.plan, past, num_queries)
        kept = self.cached if self.plan.begun else {}
        request = self.handle.request(self.state, self.plan, self.rotations, past + num_queries, kept)
        if not kept:
            kept.update(self.handle.project_at_once(request))
        arguments["audio"] = self.request = request

    def _check_inferred(self, mask: Tensor | None, batch: int) -> None:
        """A prompt without a mask gets one from transformers, which infers it from padding tokens; a prompt in chunks
        is whole at last."""
        if self.unread is None or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < self.unread:
            return
        _check_texts(self.state, (mask != 0).sum(dim=1)[:: self.copies(batch)])
        self.unread = None


def keys_in(cache: Any, device: torch.device) -> int | Tensor:
    """Text keys in a cache; a tensor on ``device`` where a compiled step must not depend on their number."""
    if cache is None:
        return 0
    count: int | Tensor = cache.get_seq_length()
    if getattr(cache, "is_compileable", False):
        return torch.as_tensor(count, device=device) + 0  # not the cache's own counter, which moves on
    return int(count)


def check_unchanged(request: "Request", arguments: dict[str, Any]) -> None:
    """What runs must be as long as what was prepared."""
    if not isinstance(request.num_keys, int):
        return  # counted on the device
    inputs = next(arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None)
    num_keys = keys_in(arguments.get("past_key_values"), inputs.device) + inputs.shape[1]
    if num_keys != request.num_keys:
        raise RuntimeError(
            f"a forward with audio must run the text that was prepared, {request.num_keys} tokens with the cached "
            f"ones, got {num_keys}: somebody adds to it (peft's prompt learning does)"
        )


def current(model: PreTrainedModel) -> Generation | None:
    """The generate call with audio that this model is in."""
    generation = _CURRENT.get()
    return generation if generation is not None and generation.handle.model is model else None


def generate(handle: "LalHandle", audio: AudioState | None, arguments: dict[str, Any]) -> Any:
    """The stock generate; ``arguments`` by name."""
    generation = None
    if audio is not None:
        unread = _check_prompt(audio, arguments)
        prepare = handle.model.prepare_inputs_for_generation
        if getattr(prepare, "__func__", None) is type(handle.model).prepare_inputs_for_generation:
            raise RuntimeError(
                "prepare_inputs_for_generation must be the one that attach made, got the stock one, which somebody has "
                "put back (peft's prompt learning does): detach and attach again"
            )
        generation = Generation(handle, audio, unread)
    token = _CURRENT.set(generation)  # None too: an assistant's own call sees the text only
    try:
        outputs = handle.stock("generate")(**arguments)
    finally:
        _CURRENT.reset(token)
    if generation is not None and (generation.request is None or not generation.request.ran):
        raise RuntimeError(
            "generate must run what the attached model's prepare_inputs_for_generation returns, which has the audio in "
            "it, got no such forward"
        )
    return outputs


def _check_prompt(audio: AudioState, arguments: dict[str, Any]) -> int | None:
    """Returns the prompt's columns if its mask is to be inferred."""
    if not isinstance(audio, AudioState):
        raise TypeError(f"audio must be an AudioState, got {type(audio).__name__}")
    config = arguments.get("generation_config")
    if arguments.get("assistant_early_exit") or getattr(config, "assistant_early_exit", None):
        raise ValueError("assistant_early_exit must be None with audio: its first layers would not see the audio")
    prompts = (arguments.get(name) for name in ("inputs_embeds", "inputs", "input_ids"))  # in generate's own order
    prompt = next((prompt for prompt in prompts if prompt is not None), None)
    if not isinstance(prompt, Tensor) or prompt.ndim < 2:
        raise ValueError("generate must be given a prompt with audio: input_ids or inputs_embeds of (B, T, ...)")
    rows, length = prompt.shape[:2]
    if rows != audio.batch_size:
        raise ValueError(f"audio must describe the prompt's {rows} rows, got {audio.batch_size}")
    mask = arguments.get("attention_mask")
    lengths = torch.full((rows,), length, device=audio.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        lengths = (mask != 0).sum(dim=1)
    _check_texts(audio, lengths)
    return length if mask is None else None


def _check_texts(audio: AudioState, lengths: Tensor) -> None:
    """``lengths`` (B,) of a prompt's texts, without padding."""
    if bool((lengths == 0).any()):
        raise ValueError("every row of a prompt with audio must hold a token, got a row of padding")
    check_places(audio, lengths)
