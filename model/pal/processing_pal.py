"""From texts and clips to the inputs that :class:`PalForConditionalGeneration` takes."""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from palkernels.model.audio.limits import MAX_BYTES
from palkernels.model.audio.waveforms import waveform
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.parts import by_entry, outline_connectors, tower_settings
from palkernels.model.pal.tokenizer import AUDIO_TOKEN

__all__ = ["PalProcessor"]

AUDIO_KEYS = ("audio", "path", "url", "audio_url")  # under which a message's item may hold its clip
# For tokenizers that bring no template of their own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class PalProcessor(ProcessorMixin):  # type: ignore[misc]
    """A tokenizer, and the features that the encoders take of a clip. It loads no encoder.

    Args:
        tokenizer: a tokenizer that knows ``audio_token``.
        encoders, summary_tokens: as in the :class:`PalConfig`; ``PalProcessor.from_config`` takes them from it.
        audio_token: the token that stands in a text wherever a clip is heard. If audio enters by PLITS its id is
            ``config.audio_token_id``.
        chat_template: the template that :meth:`apply_chat_template` renders messages with; None: the tokenizer's own,
            which need not know of audio.
        max_seconds: the longest clip; None: what the encoder with the shortest window hears. Longer ones are refused.
        max_bytes: the largest file or array.

    Raises:
        ValueError: the tokenizer lacks ``audio_token``, or ``max_seconds`` is more than an encoder hears.
    """

    # Positional: transformers reads the names of positional arguments only when it loads a processor.
    def __init__(
        self,
        tokenizer: Any,
        encoders: Sequence[dict[str, Any]],
        summary_tokens: int = 0,
        audio_token: str = AUDIO_TOKEN,
        chat_template: str | None = None,
        max_seconds: float | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.encoders = list(encoders)
        self.summary_tokens = summary_tokens
        self.audio_token = audio_token
        self.max_bytes = max_bytes
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id is None or self.audio_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer must know {audio_token!r} as one token: add_special_tokens adds it")
        self._features = [
            TOWERS[tower_type].make_features(settings) for tower_type, settings in tower_settings(self.encoders)
        ]
        window = min(features.max_samples / features.sampling_rate for features in self._features)
        self.max_seconds = window if max_seconds is None else max_seconds
        if not 0 < self.max_seconds <= window:
            raise ValueError(
                f"max_seconds must be above 0 and at most {window:g}, the longest clip that every encoder hears whole, "
                f"got {max_seconds!r}"
            )
        self._connectors = outline_connectors(self.encoders)

    @classmethod
    def from_config(cls, tokenizer: Any, config: PalConfig, **settings: Any) -> Self:
        """Return the processor of a model with this config.

        Args:
            tokenizer: the model's.
            config: the model's.
            settings: further arguments of the class.

        Raises:
            ValueError: the audio token has another id than in the config.
        """
        processor = cls(tokenizer, config.encoders, config.summary_tokens, **settings)
        expected, token_id = config.audio_token_id, processor.audio_token_id
        if config.uses("plits") and token_id != expected:
            raise ValueError(f"the audio token must have the id {expected} as in the config, got {token_id}")
        return processor

    def __call__(
        self,
        text: str | Sequence[str],
        audio: Any = None,
        sampling_rate: int | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Return one batch for ``forward`` and ``generate``.

        Args:
            text: one text or several, with ``audio_token`` for each clip that is heard there. It becomes as many
                placeholders as the clip has PLITS tokens; LAL audio stands before them.
            audio: clips in the order of their tokens, or a list of them for each text; a single clip needs no list.
                Each is (samples,), a float NumPy array or tensor, or the path of a WAV, FLAC, OGG or MP3 file. An
                object that is given several times is encoded once.
            sampling_rate: of the arrays, in Hz. Other rates than the encoders' are converted.
            add_special_tokens: as the tokenizer takes it, but a text that begins with the BOS token gets no second one.
            padding, padding_side, max_length, pad_to_multiple_of: as ``tokenizer.pad`` takes them.
            return_tensors: "pt".

        Returns:
            input_ids, attention_mask (B, T), and with audio input_features, audio_lengths (C, towers), audio_index and
            insert_at (B, K); see :class:`PalForConditionalGeneration`.

        Raises:
            AudioError: a clip is refused; the message names the limit.
            ValueError: clips and tokens do not match, or an argument is none of these.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}')
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"text must be a string or a list of them, got {text!r}")
        token_ids = [self._tokenize(one, add_special_tokens) for one in texts]
        clips_of_texts = self._clips_of_texts(audio, [ids.count(self.audio_token_id) for ids in token_ids])
        clips, index = _distinct(clips_of_texts)
        features, lengths = self.audio_features(clips, sampling_rate) if clips else (None, None)

        counts = [] if lengths is None else self.num_placeholders(lengths).tolist()
        expanded, insert_at = [], []
        for ids, clip_numbers in zip(token_ids, index, strict=True):
            with_placeholders, places = self._expand(ids, [counts[number] for number in clip_numbers])
            expanded.append(with_placeholders)
            insert_at.append(places)
        data = dict(
            self.tokenizer.pad(
                {"input_ids": expanded},
                padding=padding,
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
                return_tensors="pt",
            )
        )
        if features is not None:
            data["input_features"] = features[0] if len(features) == 1 else features
            data["audio_lengths"] = lengths
            data["audio_index"] = _table(index, -1)
            data["insert_at"] = _table(insert_at, 0)
        return BatchFeature(data)

    def audio_features(self, clips: Sequence[Any], sampling_rate: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Return the ``input_features`` of C clips, one tensor per tower, and their ``audio_lengths`` (C, towers).

        Args:
            clips: arrays, tensors or paths, as ``__call__`` takes them.
            sampling_rate: of the arrays, in Hz.

        Raises:
            AudioError: a clip is refused; the message names the limit.
        """
        input_features, lengths = [], []
        at_rate: dict[int, list[Tensor]] = {}
        for features in self._features:
            rate = features.sampling_rate
            if rate not in at_rate:
                limits: dict[str, Any] = {"max_seconds": self.max_seconds, "max_bytes": self.max_bytes}
                at_rate[rate] = [waveform(clip, sampling_rate, rate, **limits) for clip in clips]
            tower_features, tower_lengths = features(at_rate[rate])
            input_features.append(tower_features)
            lengths.append(tower_lengths)
        return input_features, torch.stack(lengths, dim=1)

    def num_placeholders(self, audio_lengths: Tensor) -> Tensor:
        """Return how many PLITS tokens each clip has (C,), from its valid states ``audio_lengths`` (C, towers)."""
        total = torch.full_like(audio_lengths[:, 0], self.summary_tokens)
        entries = by_entry(self.encoders, audio_lengths.unbind(1))
        for connector, (entry, lengths) in zip(self._connectors, entries, strict=True):
            if entry["integration"] == "plits":
                total = total + connector.output_lengths(lengths[0])
        return total

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        sampling_rate: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages as one text, each {"type": "audio"} in a message's content as ``audio_token``.

        Args:
            conversation: messages {"role": ..., "content": a string, or a list of {"type": "text", "text": ...} and
                {"type": "audio", "audio": an array or a path}}, or several such lists. "path", "url" and "audio_url"
                may stand for "audio"; nothing is downloaded.
            chat_template: the template; None: the processor's, or the tokenizer's.
            add_generation_prompt: whether the text ends with the beginning of an answer.
            tokenize: whether to return the batch that ``__call__`` makes of text and clips instead of the text.
            return_dict: with ``tokenize``, whether to return the whole batch, or its ``input_ids`` alone.
            sampling_rate: of arrays, in Hz.
            kwargs: further arguments of the template.

        Raises:
            ValueError: content of another type, or ``audio_token`` in the text of a message.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        template = chat_template or self.chat_template or self.tokenizer.chat_template or PLAIN_TEMPLATE
        texts, clips = [], []
        for messages in conversation if batched else [conversation]:
            flat, audio = self._flatten(messages)
            settings = {"add_generation_prompt": add_generation_prompt, "tokenize": False, **kwargs}
            texts.append(self.tokenizer.apply_chat_template(flat, chat_template=template, **settings))
            clips.append(audio)
        if not tokenize:
            return texts if batched else texts[0]
        batch = self(texts, clips, sampling_rate, add_special_tokens=False)
        return batch if return_dict else batch["input_ids"]

    @property
    def model_input_names(self) -> list[str]:
        """The keys of a batch with audio."""
        names = ["input_ids", "attention_mask"]
        return [*names, "input_features", "audio_lengths", "audio_index", "insert_at"]

    def _flatten(self, messages: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        """Return the messages with strings for content, and the clips that they hold."""
        flat, clips = [], []
        for message in messages:
            content, parts = message["content"], []
            for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                item_type = item.get("type")
                clip = next((item[key] for key in AUDIO_KEYS if item.get(key) is not None), None)
                if item_type == "audio" and clip is not None:
                    parts.append(self.audio_token)
                    clips.append(clip)
                elif item_type == "text" and self.audio_token not in item["text"]:
                    parts.append(item["text"])
                else:
                    in_text = item_type == "text"
                    got = f"{self.audio_token!r} in a text" if in_text else f"{sorted(item)} of type {item_type!r}"
                    raise ValueError(f'content must be "text", or "audio" with an array or a path, got {got}')
            flat.append({**message, "content": "".join(parts)})
        return flat, clips

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return a text's ids, without a second BOS token."""
        bos = self.tokenizer.bos_token
        begun = bool(bos) and text.startswith(bos)
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens and not begun)["input_ids"]
        return ids

    def _clips_of_texts(self, audio: Any, counts: list[int]) -> list[list[Any]]:
        """Return the clips of each text, as many as ``counts`` says that it has audio tokens."""
        clips = [] if audio is None else list(audio) if isinstance(audio, list | tuple) else [audio]
        by_text = bool(clips) and all(isinstance(item, list | tuple) for item in clips)
        got: Any = [len(of_text) for of_text in clips] if by_text else len(clips)
        expected: Any = counts if by_text else sum(counts)
        if got != expected:
            raise ValueError(f"audio must hold a clip for each {self.audio_token} in the text, {expected}, got {got}")
        if by_text:
            return [list(of_text) for of_text in clips]
        remaining = iter(clips)
        return [[next(remaining) for _ in range(count)] for count in counts]

    def _expand(self, ids: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return a text's ids with each audio token replaced by its ``counts`` placeholders, and where each stands."""
        expanded: list[int] = []
        places: list[int] = []
        for token in ids:
            if token == self.audio_token_id:
                count = counts[len(places)]
                places.append(len(expanded))
                expanded += [token] * count
            else:
                expanded.append(token)
        return expanded, places


def _distinct(clips_of_texts: list[list[Any]]) -> tuple[list[Any], list[list[int]]]:
    """Return every clip once, and the clips of each text by number."""
    clips: list[Any] = []
    numbers: dict[Any, int] = {}
    index: list[list[int]] = []
    for clips_of_text in clips_of_texts:
        index.append([])
        for clip in clips_of_text:
            key = os.fspath(clip) if isinstance(clip, str | os.PathLike) else id(clip)
            if key not in numbers:
                numbers[key] = len(clips)
                clips.append(clip)
            index[-1].append(numbers[key])
    return clips, index


def _table(of_texts: list[list[int]], filler: int) -> Tensor:
    """Return the numbers of each text as (B, K), filled up to the longest list, K at least 1."""
    longest = max(1, *map(len, of_texts))
    return torch.tensor([numbers + [filler] * (longest - len(numbers)) for numbers in of_texts])
