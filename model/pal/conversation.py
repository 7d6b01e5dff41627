"""A conversation about clips: several questions to one model, in turn, of which the first brings the clips."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from palkernels.model.causal_lm.caches import cache_keyword
from palkernels.model.pal.modeling_pal import PalForConditionalGeneration
from palkernels.model.pal.processing_pal import PalProcessor

__all__ = ["Conversation"]

# What a cache of one row, which goes on, needs of generate.
NEEDED = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "return_dict_in_generate": False}
CLIPS = ("input_features", "audio_lengths")
HEARD = ("audio_features", "audio_index", "insert_at")


class Conversation:
    """Questions to a model, one after another. The clips are encoded once, and what was asked and said is in a cache:
    a further question costs its own tokens. Where a chat template writes earlier turns otherwise once others follow,
    the texts run anew, but no encoder does.

    Args:
        model: The model, for inference.
        processor: Its own, with a chat template.
        clips: What is heard before the first question, each as the processor takes it.
        sampling_rate: Of arrays that come without theirs, in Hz.

    Attributes:
        messages: What was asked and answered so far.
    """

    def __init__(
        self,
        model: PalForConditionalGeneration,
        processor: PalProcessor,
        clips: Sequence[Any] = (),
        *,
        sampling_rate: int | None = None,
    ) -> None:
        if isinstance(clips, str | bytes):
            raise TypeError(f"clips must be a list of clips, got one {type(clips).__name__}")
        self.model, self.processor, self.clips, self.sampling_rate = model, processor, list(clips), sampling_rate
        self.messages: list[dict[str, Any]] = []
        self._heard: dict[str, Any] = {}  # the audio's arguments, once it is encoded
        self._cache: Any = None  # of `_ids`, but perhaps for the last; None: the next question runs the whole text
        self._ids: Tensor | None = None  # (1, T)
        self._text = ""  # what they are of
        self._place: Any = None  # the model's device and dtype

    def ask(self, question: str, **options: Any) -> str:
        """Return the answer to a further question.

        Args:
            question: The question.
            options: Of ``generate``, as ``max_new_tokens`` and ``streamer``. One answer is made, with a cache.

        Raises:
            AudioError, ValueError: A clip or a question is refused; or an option asks for several answers, for none of
                the cache, or for more than tokens.
        """
        self._check(options)
        text = {"type": "text", "text": question}
        heard = [] if self.messages else [{"type": "audio", "audio": clip} for clip in self.clips]
        messages = [*self.messages, {"role": "user", "content": [*heard, text]}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        cache, self._cache = self._cache, None  # what fails midway leaves it unfit
        if (place := (self.model.device, self.model.dtype)) != self._place:
            cache, self._ids, self._heard, self._place = None, None, {}, place  # the model has been moved
        goes_on = self._ids is not None and prompt.startswith(self._text)
        inputs = self._going_on(prompt) if goes_on else self._anew(messages)
        if cache is None or not goes_on:
            cache = DynamicCache(config=self.model.config.text_config)
            inputs |= self._heard
        keyword = cache_keyword(self.model.language_model.forward) or "past_key_values"
        ids = inputs["input_ids"]
        found = self.model.generate(**{**inputs, **options, **NEEDED, keyword: cache})
        new = self._without_end(found[:, ids.shape[1] :])
        decode = self.processor.tokenizer.decode
        said: str = decode(new[0], skip_special_tokens=True)
        self._ids, self._cache = torch.cat([ids, new], dim=1), cache
        self._text = prompt + decode(new[0], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.messages = [*messages, {"role": "assistant", "content": said}]
        return said

    @staticmethod
    def _check(options: dict[str, Any]) -> None:
        """Refuse options of generate that do not go with a conversation."""
        given = dict(options)
        if (config := options.get("generation_config")) is not None:
            given |= {name: getattr(config, name, None) for name in NEEDED}
        for name, needed in NEEDED.items():
            if given.get(name) not in (None, needed):
                raise ValueError(f"{name} must be {needed} in a conversation, got {given[name]}")

    def _going_on(self, prompt: str) -> dict[str, Any]:
        """Return the arguments of a text that begins with the one so far."""
        assert self._ids is not None
        behind = self.processor.tokenizer(prompt[len(self._text) :], add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([self._ids, behind["input_ids"].to(self._ids)], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _anew(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the arguments of the whole text, and take note of what it hears."""
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, sampling_rate=self.sampling_rate
        ).to(self.model.device)
        if self.clips:
            features = self._heard.get("audio_features")
            if features is None:
                with torch.no_grad():
                    features = self.model.get_audio_features(*(inputs[name] for name in CLIPS))
            self._heard = {name: inputs[name] for name in HEARD if name in inputs} | {"audio_features": features}
        return {name: x for name, x in inputs.items() if name not in CLIPS}

    def _without_end(self, tokens: Tensor) -> Tensor:
        """Return an answer's tokens (1, N) without the one that ends it: a template says what stands between turns."""
        ends = self.model.generation_config.eos_token_id
        known = torch.tensor([] if ends is None else ends, device=tokens.device).reshape(-1)
        return tokens[:, :-1] if tokens.shape[1] and torch.isin(tokens[0, -1], known) else tokens
