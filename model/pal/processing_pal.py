"""Texts and clips as :class:`PalForConditionalGeneration` takes them."""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from palkernels.model.audio.waveforms import waveform
from palkernels.model.encoders.towers import TOWERS
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.parts import outline_connectors, tower_settings

__all__ = ["PalProcessor"]

AUDIO_TOKEN = "<|AUDIO|>"
MAX_BYTES = 100 * 10**6
# For tokenizers that bring no template of their own.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class PalProcessor(ProcessorMixin):  # type: ignore[misc]
    """A tokenizer, and what the encoders hear of a clip. It loads no encoder.

    Args:
        tokenizer: a tokenizer that knows ``audio_token``.
        encoders, summary_tokens: those of the :class:`PalConfig`; ``PalProcessor.from_config`` takes them from it.
        audio_token: stands in a text wherever a clip is heard. If audio enters by PLITS its id is
            ``config.audio_token_id``.
        chat_template: what :meth:`apply_chat_template` renders messages with; None: the tokenizer's own, which need not
            know of audio.
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
        self._features = [TOWERS[kind].make_features(settings) for kind, settings in tower_settings(self.encoders)]
        window = min(x.max_samples / x.sampling_rate for x in self._features)
        self.max_seconds = window if max_seconds is None else max_seconds
        if not 0 < self.max_seconds <= window:
            raise ValueError(f"max_seconds must be from above 0 to {window:g}, which is heard, got {max_seconds!r}")
        self._connectors = outline_connectors(self.encoders)

    @classmethod
    def from_config(cls, tokenizer: Any, config: PalConfig, **settings: Any) -> Self:
        """The processor of a model with this config; ``settings`` are further arguments of the class."""
        found = cls(tokenizer, config.encoders, config.summary_tokens, **settings)
        if config.uses("plits") and found.audio_token_id != config.audio_token_id:
            raise ValueError(
                f"the audio token must have the id {config.audio_token_id} as in the config, got {found.audio_token_id}"
            )
        return found

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
        """One batch for ``forward`` and ``generate``.

        Args:
            text: one text or several, with ``audio_token`` for each clip that is heard there. It becomes as many
                placeholders as the clip has PLITS tokens; LAL audio stands before them.
            audio: clips in the order of their tokens, or a list of them for each text; one may stand alone. Each is
                (samples,), a float NumPy array or tensor, or the path of a WAV, FLAC, OGG or MP3 file. An object that
                is given several times is encoded once.
            sampling_rate: of the arrays, in Hz. Other rates than the encoders' are converted.
            add_special_tokens: the tokenizer's; a text that begins with its BOS token gets none.
            padding, padding_side, max_length, pad_to_multiple_of: the tokenizer's, for whole batches of "pt" tensors.

        Returns:
            input_ids, attention_mask (B, T), and with audio input_features, audio_lengths (C, towers), audio_index and
            insert_at (B, K); see :class:`PalForConditionalGeneration`.

        Raises:
            AudioError: a clip is refused; the message names the limit.
            ValueError: clips and tokens do not match.
        """
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", got {return_tensors!r}')
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(x, str) for x in texts):
            raise ValueError(f"text must be a string or a list of them, got {text!r}")
        bos = self.tokenizer.bos_token
        rows = [
            self.tokenizer(x, add_special_tokens=add_special_tokens and not (bos and x.startswith(bos)))["input_ids"]
            for x in texts
        ]
        heard = self._heard(audio, [row.count(self.audio_token_id) for row in rows])
        clips, index = _distinct(heard)
        found, lengths = self.audio_features(clips, sampling_rate) if clips else (None, None)

        counts = [] if lengths is None else self.num_placeholders(lengths).tolist()
        expanded, insert_at = [], []
        for row, own in zip(rows, index, strict=True):
            ids, places = self._expand(row, [counts[clip] for clip in own])
            expanded.append(ids)
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
        if found is not None:
            data["input_features"] = found[0] if len(found) == 1 else found
            data["audio_lengths"] = lengths
            data["audio_index"] = _table(index, -1)
            data["insert_at"] = _table(insert_at, 0)
        return BatchFeature(data)

    def audio_features(self, clips: Sequence[Any], sampling_rate: int | None = None) -> tuple[list[Tensor], Tensor]:
        """``input_features``, one tensor per tower, and ``audio_lengths`` (C, towers) of clips."""
        found, lengths = [], []
        at_rate: dict[int, list[Tensor]] = {}
        for features in self._features:
            rate = features.sampling_rate
            if rate not in at_rate:
                limits: dict[str, Any] = {"max_seconds": self.max_seconds, "max_bytes": self.max_bytes}
                at_rate[rate] = [waveform(clip, sampling_rate, rate, **limits) for clip in clips]
            inputs, valid = features(at_rate[rate])
            found.append(inputs)
            lengths.append(valid)
        return found, torch.stack(lengths, dim=1)

    def num_placeholders(self, audio_lengths: Tensor) -> Tensor:
        """(C,) PLITS tokens of clips whose towers have ``audio_lengths`` (C, towers) valid states."""
        total = torch.full_like(audio_lengths[:, 0], self.summary_tokens)
        first = 0
        for entry, connector in zip(self.encoders, self._connectors, strict=True):
            if entry["integration"] == "plits":
                total = total + connector.output_lengths(audio_lengths[:, first])
            first += len(tower_settings([entry]))
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
        """Messages as one text, each {"type": "audio"} in a message's content as ``audio_token``.

        Args:
            conversation: messages {"role": ..., "content": a string, or a list of {"type": "text", "text": ...} and
                {"type": "audio", "audio": an array or a path}}, or several such lists. "path", "url" and "audio_url"
                may stand for "audio"; nothing is downloaded.
            chat_template: None: the processor's, or the tokenizer's.
            tokenize: give the batch that ``__call__`` makes of text and clips instead of the text.
            sampling_rate: of arrays.
            kwargs: for the template.

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
        found = self(texts, clips, sampling_rate, add_special_tokens=False)
        return found if return_dict else found["input_ids"]

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask"]
        return [*names, "input_features", "audio_lengths", "audio_index", "insert_at"]

    def _flatten(self, messages: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages with strings for content, and the clips that they hold."""
        flat, clips = [], []
        for message in messages:
            content, parts = message["content"], []
            for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = item.get("type")
                source = next((item[x] for x in ("audio", "path", "url", "audio_url") if item.get(x) is not None), None)
                if kind == "audio" and source is not None:
                    parts.append(self.audio_token)
                    clips.append(source)
                elif kind == "text" and self.audio_token not in item["text"]:
                    parts.append(item["text"])
                else:
                    got = f"{self.audio_token!r} in a text" if kind == "text" else f"{sorted(item)} of type {kind!r}"
                    raise ValueError(f'content must be "text", or "audio" with an array or a path, got {got}')
            flat.append({**message, "content": "".join(parts)})
        return flat, clips

    def _heard(self, audio: Any, tokens: list[int]) -> list[list[Any]]:
        """The clips of each text, as many as it has audio tokens."""
        given = [] if audio is None else list(audio) if isinstance(audio, list | tuple) else [audio]
        nested = bool(given) and all(isinstance(x, list | tuple) for x in given)
        got: Any = [len(x) for x in given] if nested else len(given)
        wanted: Any = tokens if nested else sum(tokens)
        if got != wanted:
            raise ValueError(f"audio must hold a clip for each {self.audio_token} in the text, {wanted}, got {got}")
        if nested:
            return [list(x) for x in given]
        rest = iter(given)
        return [[next(rest) for _ in range(count)] for count in tokens]

    def _expand(self, row: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
        """A text's ids with each audio token replaced by its placeholders, and where each stands."""
        ids: list[int] = []
        places: list[int] = []
        for token in row:
            if token == self.audio_token_id:
                ids += [token] * counts[len(places)]
                places.append(len(ids) - counts[len(places)])
            else:
                ids.append(token)
        return ids, places


def _distinct(heard: list[list[Any]]) -> tuple[list[Any], list[list[int]]]:
    """Every clip once, and the clips of each text by number."""
    clips: list[Any] = []
    numbers: dict[Any, int] = {}
    index: list[list[int]] = []
    for own in heard:
        index.append([])
        for clip in own:
            key = os.fspath(clip) if isinstance(clip, str | os.PathLike) else id(clip)
            if key not in numbers:
                numbers[key] = len(clips)
                clips.append(clip)
            index[-1].append(numbers[key])
    return clips, index


def _table(rows: list[list[int]], filler: int) -> Tensor:
    """(B, K), rows filled up to the longest, which has one entry at least."""
    longest = max(1, *map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


AutoProcessor.register(PalConfig, PalProcessor)
