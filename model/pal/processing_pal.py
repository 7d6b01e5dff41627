"""From texts and clips to the inputs that :class:`PalForConditionalGeneration` takes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from palkernels.model.audio.limits import MAX_BYTES
from palkernels.model.audio.waveforms import waveform
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.configuration_pal import PalConfig, complete_entry
from palkernels.model.pal.messages import ChatTemplate, conversations_of, template_source, template_variables
from palkernels.model.pal.options import Options, is_option, read_options, with_rate
from palkernels.model.pal.parts import by_entry, outline_connectors, tower_settings
from palkernels.model.pal.rows import (
    IGNORED,
    Span,
    arrays,
    clips_of_texts,
    cut,
    distinct,
    ends_of_texts,
    expand,
    is_list,
    pad,
    read_row,
    table,
)
from palkernels.model.pal.tokenizer import AUDIO_TOKEN, knows_token
from palkernels.model.pal.windows import features_of, output_lengths, state_length, windows_of

__all__ = ["PalProcessor"]

BYTES_OF_A_SECOND = 4 * 16_000  # in float32


class PalProcessor(ProcessorMixin):  # type: ignore[misc]
    """A tokenizer, and the features that the encoders take of a clip. It loads no encoder.

    Args:
        tokenizer: a tokenizer that knows ``audio_token``.
        encoders, summary_tokens: as in the :class:`PalConfig`; ``PalProcessor.from_config`` takes them from it.
        audio_token: the token that stands in a text wherever a clip is heard. If audio enters by PLITS its id is
            ``config.audio_token_id``.
        chat_template: the template that :meth:`apply_chat_template` renders messages with, or several by name; None:
            the tokenizer's own, which need not know of audio.
        max_seconds: the longest clip, longer ones are refused; None: what ``max_bytes`` hold at 16 kHz in float32. A
            clip longer than an encoder hears is cut into windows.
        max_bytes: the largest file or array.

    Raises:
        ValueError: the tokenizer lacks ``audio_token``, ``max_seconds`` is not positive, or an entry of ``encoders`` is
            malformed.
    """

    # Positional: transformers reads the names of positional arguments only when it loads a processor.
    def __init__(
        self,
        tokenizer: Any,
        encoders: Sequence[dict[str, Any]] | None = None,
        summary_tokens: int = 0,
        audio_token: str = AUDIO_TOKEN,
        chat_template: Any = None,
        max_seconds: float | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if encoders is None:  # transformers takes a directory without the file for a processor without settings
            raise ValueError("encoders must be given, got none: processor.save_pretrained writes processor_config.json")
        super().__init__(tokenizer, chat_template=chat_template)
        self.encoders = [complete_entry(entry) for entry in encoders]
        self.summary_tokens = summary_tokens
        self.audio_token = audio_token
        self.max_bytes = max_bytes
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(audio_token)
        if not knows_token(tokenizer, audio_token):
            raise ValueError(
                f"the tokenizer must know {audio_token!r} as one token, got none: from_config(add_audio_token=True) "
                f"or tokenizer.add_tokens([{audio_token!r}], special_tokens=True) adds it"
            )
        self._features = [
            TOWERS[tower_type].make_features(settings) for tower_type, settings in tower_settings(self.encoders)
        ]
        self.windows = windows_of(self.encoders, self._features)
        self.max_seconds = max_seconds
        if max_seconds is not None and not 0 < max_seconds < math.inf:
            raise ValueError(f"max_seconds must be positive and finite, or None, got {max_seconds!r}")
        self._connectors = outline_connectors(self.encoders)

    @classmethod
    def from_config(cls, tokenizer: Any, config: PalConfig, add_audio_token: bool = False, **settings: Any) -> Self:
        """Return the processor of a model with this config.

        Args:
            tokenizer: the model's.
            config: the model's.
            add_audio_token: whether to add ``audio_token`` to a tokenizer that lacks it. If audio enters by PLITS, the
                config must have the id that it gets, which is within the vocabulary that the model has.
            settings: further arguments of the class.

        Raises:
            ValueError: the audio token has another id than in the config.
        """
        token = settings.get("audio_token", AUDIO_TOKEN)
        if add_audio_token and not knows_token(tokenizer, token):
            tokenizer.add_tokens([token], special_tokens=True)
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
        output_labels: bool = False,
        labels_from: int | Sequence[int] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Return one batch for ``forward`` and ``generate``.

        Args:
            text: one text or several, with ``audio_token`` for each clip that is heard there. It becomes as many
                placeholders as the clip has PLITS tokens; LAL audio stands before them.
            audio: clips in the order of their tokens, or a list of them for each text; a single clip needs no list.
                Each is (samples,), a float NumPy array or tensor; such an array with its rate, as ``datasets`` has it:
                {"array": ..., "sampling_rate": ...}; torchcodec's AudioDecoder or AudioSamples; or the path of a
                file or its bytes, in a dict or not. An object given several times is encoded once.
            sampling_rate: of arrays that come without theirs, in Hz. Other rates than the encoders' are converted.
            output_labels: whether to return labels, of all text.
            labels_from: where in each text the labels begin, in characters, an ``audio_token`` counting as it is
                written; one number for all texts or one for each.
            options: as transformers' processors take them, flat or in ``text_kwargs``, ``audio_kwargs`` and
                ``common_kwargs``: padding (True, False or "max_length"), padding_side ("left"), max_length, truncation,
                which cuts text and never a clip, on the tokenizer's ``truncation_side``; pad_to_multiple_of,
                add_special_tokens (a text that begins with the BOS token gets no second one), return_tensors ("np").

        Returns:
            input_ids, attention_mask (B, T), and with audio input_features, audio_lengths (C, towers), audio_index and
            insert_at (B, K); see :class:`PalForConditionalGeneration`. If asked for, labels (B, T): the ids, and -100
            at padding, placeholders, before ``labels_from``, and at a text's first token, which nothing foretells.

        Raises:
            AudioError: a clip is refused; the message names the limit.
            TypeError: an option is not known.
            ValueError: clips and tokens do not match, or an argument is none of these.
        """
        read = read_options(with_rate(options, sampling_rate), self.tokenizer)
        texts: list[Any] = list(text) if is_list(text) else [text]
        if not texts or not all(isinstance(one, str) for one in texts):
            kinds = sorted({type(one).__name__ for one in texts}) or "none"
            remedy = ": apply_chat_template(..., tokenize=True) takes messages" if {"dict", "list"} & set(kinds) else ""
            raise ValueError(f"text must be a string or a list of them, got {kinds}{remedy}")
        labels = output_labels or labels_from is not None
        spans = ends_of_texts(labels_from or 0, texts) if labels else [[] for _ in texts]
        return self._batch(texts, audio, spans, read, labels=labels)

    def _batch(
        self,
        texts: Sequence[str],
        audio: Any,
        spans: Sequence[Sequence[Span]],
        options: Options,
        labels: bool = False,
        masks: bool = False,
    ) -> BatchFeature:
        """Return a batch, with ``labels`` or ``assistant_masks`` of the spans of each text."""
        rows = [read_row(self.tokenizer, text, options, marked) for text, marked in zip(texts, spans, strict=True)]
        counts_of_texts = [row.ids.count(self.audio_token_id) for row in rows]
        clips, index = distinct(clips_of_texts(audio, counts_of_texts, self.audio_token))
        features, lengths = self.audio_features(clips, options.sampling_rate) if clips else (None, None)
        counts = [] if lengths is None else self.num_placeholders(lengths).tolist()
        rows = [
            expand(row, self.audio_token_id, [counts[number] for number in numbers])
            for row, numbers in zip(rows, index, strict=True)
        ]
        if options.truncation:
            side = self.tokenizer.truncation_side
            rows = [cut(row, options.max_length or 0, side, number) for number, row in enumerate(rows)]
        input_ids, attention_mask, marks = pad(self.tokenizer, rows, options)
        data: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if masks:
            data["assistant_masks"] = marks.long()
        if labels:
            marks[torch.arange(len(rows)), attention_mask.argmax(dim=1)] = False
            data["labels"] = input_ids.masked_fill(~marks, IGNORED)
        if features is not None:
            data["input_features"] = features[0] if len(features) == 1 else features
            data["audio_lengths"] = lengths
            data["audio_index"] = table(index, -1)
            data["insert_at"] = table([row.places for row in rows], 0)
        return BatchFeature(arrays(data) if options.return_tensors == "np" else data)

    def audio_features(self, clips: Sequence[Any], sampling_rate: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Return the ``input_features`` of C clips, one tensor per tower, and their ``audio_lengths`` (C, towers).

        A tower's tensor holds the windows of all clips in order: one for a clip that the tower hears whole.

        Args:
            clips: in the forms that ``__call__`` takes.
            sampling_rate: of arrays that come without theirs, in Hz.

        Raises:
            AudioError: a clip is refused; the message names the limit.
        """
        input_features, lengths = [], []
        at_rate: dict[int, list[Tensor]] = {}
        for features, window in zip(self._features, self.windows, strict=True):
            rate = features.sampling_rate
            if rate not in at_rate:
                limits: dict[str, Any] = {"max_seconds": self.longest_clip, "max_bytes": self.max_bytes}
                at_rate[rate] = [waveform(clip, sampling_rate, rate, **limits) for clip in clips]
            tower_features, tower_lengths = features_of(at_rate[rate], features, window)
            input_features.append(tower_features)
            lengths.append(tower_lengths)
        return input_features, torch.stack(lengths, dim=1)

    @property
    def highest_rate(self) -> int:
        """The highest rate, in Hz, at which an encoder takes clips."""
        return max(features.sampling_rate for features in self._features)

    @property
    def longest_clip(self) -> float:
        """The seconds of the longest clip: ``max_seconds``, or what ``max_bytes`` hold."""
        return self.max_bytes / BYTES_OF_A_SECOND if self.max_seconds is None else self.max_seconds

    def state_lengths(self, samples: Callable[[int], int]) -> Tensor:
        """Return the valid states (towers,) that :meth:`audio_features` tells of a clip, without the clip.

        Args:
            samples: from a rate in Hz to the clip's samples at this rate, at least 1.
        """
        towers = zip(self._features, self.windows, strict=True)
        return torch.tensor([state_length(samples(one.sampling_rate), one, window) for one, window in towers])

    def num_placeholders(self, audio_lengths: Tensor) -> Tensor:
        """Return how many PLITS tokens each clip has (C,), from its valid states ``audio_lengths`` (C, towers)."""
        return self.num_tokens(audio_lengths, "plits") + self.summary_tokens

    def num_tokens(self, audio_lengths: Tensor, integration: str) -> Tensor:
        """Return how many tokens of each clip (C,) the entries of ``integration`` make, without summaries."""
        total = torch.zeros_like(audio_lengths[:, 0])
        towers = list(zip(audio_lengths.unbind(1), self.windows, strict=True))
        for connector, (entry, of_towers) in zip(self._connectors, by_entry(self.encoders, towers), strict=True):
            if entry["integration"] == integration:
                total = total + output_lengths(connector, *of_towers[0])
        return total

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        sampling_rate: int | None = None,
        output_labels: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages as one text, each {"type": "audio"} in a message's content as ``audio_token``.

        A template may take content as a string or go through its parts, and know of audio or not. What else a message
        holds (tool_calls, name, ...) reaches the template.

        Args:
            conversation: messages {"role": ..., "content": a string, or a list of {"type": "text", "text": ...} and
                {"type": "audio", "audio": a clip as ``__call__`` takes it}}, or several such lists. "path", "url" and
                "audio_url" may stand for "audio"; nothing is downloaded. A message may be without content.
            chat_template: the template or its name; None: the processor's, or the tokenizer's.
            tools, documents: for the template.
            add_generation_prompt: whether the text ends with the beginning of an answer.
            continue_final_message: whether the last message is left open for the answer to go on with.
            return_assistant_tokens_mask: whether the batch has ``assistant_masks`` (B, T), 1 at what the assistant
                says, placeholders excepted.
            tokenize: whether to return the batch that ``__call__`` makes of text and clips instead of the text.
            return_dict: with ``tokenize``, whether to return the whole batch, or its ``input_ids`` alone.
            sampling_rate: of arrays that come without theirs, in Hz.
            output_labels: whether the batch has ``labels`` (B, T): the ids of what the assistant says, else -100.
                A template says by {% generation %} what that is. Without such marks it is what an answer adds to the
                text that asks for it.
            processor_kwargs: options of ``__call__``. No special tokens are added unless they say so.
            kwargs: further variables of the template, or options of ``__call__``.

        Raises:
            TypeError: a keyword is neither a variable of the template nor an option.
            ValueError: content of another type, ``audio_token`` in the text of a message, no turn of the assistant to
                learn, or a template that leaves out a clip or hides what the assistant says.
        """
        source = template_source(self.chat_template, self.tokenizer, chat_template, tools)
        options = dict(processor_kwargs or {})
        output_labels = options.pop("output_labels", output_labels)
        variables, settings = template_variables(source), {}
        for name, value in kwargs.items():
            if name in variables:
                settings[name] = value
            elif not is_option(name):
                raise TypeError(f"a keyword must be an option, or a variable of the chat template, got {name!r}")
            elif name in options:
                raise ValueError(f"{name} must be given once, got it as a keyword and in processor_kwargs")
            else:
                options[name] = value
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name not in variables:
                raise ValueError(f"{name} must be None for a chat template that does not name them, got {len(value)}")
        read = read_options(with_rate(options, sampling_rate), self.tokenizer, add_special_tokens=False)
        marked = output_labels or return_assistant_tokens_mask
        if marked and not (tokenize and return_dict):
            raise ValueError("tokenize and return_dict must be True for labels and masks, got False")
        if continue_final_message and (marked or add_generation_prompt):
            raise ValueError("continue_final_message must be without generation prompt, labels and masks, got both")

        settings |= {"tools": tools, "documents": documents, "continue_final_message": continue_final_message}
        template = ChatTemplate(source, self.audio_token, self.tokenizer.special_tokens_map, **settings)
        dialogues, several = conversations_of(conversation, self.audio_token)
        if not marked:
            texts = [template.text(dialogue, add_generation_prompt) for dialogue in dialogues]
            spans: list[list[Span]] = [[] for _ in texts]
        else:
            pairs = [template.text_and_turns(dialogue, add_generation_prompt) for dialogue in dialogues]
            texts, spans = [text for text, _ in pairs], [turns for _, turns in pairs]
        if not tokenize:
            return texts if several else texts[0]
        if output_labels and not all(spans):
            silent = spans.index([])
            raise ValueError(f"a conversation must hold a turn of the assistant to learn, got none in number {silent}")
        clips = [dialogue.clips for dialogue in dialogues]
        masks = return_assistant_tokens_mask
        batch = self._batch(texts, clips, spans, read, labels=output_labels, masks=masks)
        return batch if return_dict else batch["input_ids"]

    @property
    def model_input_names(self) -> list[str]:
        """The keys of a batch with audio."""
        names = ["input_ids", "attention_mask"]
        return [*names, "input_features", "audio_lengths", "audio_index", "insert_at"]
