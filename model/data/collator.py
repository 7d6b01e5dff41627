"""From samples to what the model takes: texts by the chat template, clips decoded, labels of the answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from palkernels.errors import one_line
from palkernels.model.audio.limits import AudioError
from palkernels.model.data.clips import LengthsOfClips
from palkernels.model.data.reasons import MALFORMED, NO_ANSWER, TOO_MANY_TOKENS, RejectedError
from palkernels.model.data.sample import Sample
from palkernels.model.data.samples import Samples
from palkernels.model.data.states import EncodedStates
from palkernels.model.pal.parts import by_entry
from palkernels.model.pal.processing_pal import PalProcessor
from palkernels.model.pal.rows import IGNORED

__all__ = ["Collator"]


class Collator:
    """Makes one batch for ``forward`` of samples, with labels of what the assistant says. It can be pickled, so that
    a loader's workers decode and tokenize.

        loader = DataLoader(mixture, batch_size=8, collate_fn=Collator(processor), num_workers=4)

    Args:
        processor: The model's.
        states: The cache of frozen encoders' states, from which batches take ``encoder_states`` instead of decoding
            clips into ``input_features``.
        packing: Whether the texts of a batch stand in one row, without padding, told apart by ``position_ids``.
        max_tokens: The longest text with its placeholders; None: any. :meth:`fitting` drops longer ones beforehand.

    Raises:
        ValueError: ``max_tokens`` is no positive integer, or ``states`` are of other encoders than the processor's.
    """

    def __init__(
        self,
        processor: PalProcessor,
        *,
        states: EncodedStates | None = None,
        packing: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        if max_tokens is not None and (isinstance(max_tokens, bool) or max_tokens < 1):
            raise ValueError(f"max_tokens must be a positive integer or None, got {max_tokens!r}")
        self.processor = processor
        self.states = states
        self.packing = packing
        self.max_tokens = max_tokens
        self._batching = processor
        if states is not None:
            states.check(processor)
            self._batching = copy.copy(processor)
            self._batching.audio_features = states.of_clips  # type: ignore[method-assign]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return input_ids, attention_mask (B, T), padded on the right, labels and what describes clips; see
        :class:`PalForConditionalGeneration`. A packed batch has input_ids, position_ids and labels (1, sum of T), and
        use_cache False.

        Raises:
            AudioError: A clip is refused; the message names its sample.
            ValueError: A text is refused or longer than ``max_tokens``; the message names its sample.
        """
        batch = self._batch(samples)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for sample, length in zip(samples, lengths, strict=True):
            if self.max_tokens is not None and length > self.max_tokens:
                raise ValueError(f"{sample.source}: {self._too_many(length)}: Collator.fitting drops such samples")
        return _packed(batch, lengths) if self.packing else batch

    def fitting(self, samples: Sequence[Sample], *, progress: bool = False) -> Samples:
        """Return the samples that batches can be made of; the others are among ``dropped``.

        Dropped are samples with a clip that is longer than ``processor.longest_clip`` or cannot be read, with a text of
        more than ``max_tokens`` tokens, with one that the template refuses or hides the answer of, and with no token to
        learn.

        Raises:
            ValueError: None fits.
        """
        lengths = _lengths_of(samples)
        lengths.look_at((clip for sample in samples for clip in sample.clips()), progress=progress)

        def why_not(sample: Sample) -> RejectedError | None:
            return lengths.unfit(sample.clips(), self.processor.longest_clip) or self._refusal(sample, lengths)

        before = samples.dropped if isinstance(samples, Samples) else ()
        shown = tqdm(samples, "samples", disable=None if progress else True)
        result = Samples.sifted(shown, why_not, before, lengths)
        if not len(result):
            first = result.dropped[-1].detail if result.dropped else "there are none"
            raise ValueError(f"samples must hold at least one that fits, got {result.summary()}: {first}")
        return result

    def lengths(self, samples: Sequence[Sample]) -> list[int]:
        """Return how long each sample is, for :class:`LengthBuckets`: its tokens with placeholders, and the encoders'
        states that it hears besides.

        Raises:
            AudioError, ValueError: A sample does not fit; :meth:`fitting` drops such.
        """
        lengths = _lengths_of(samples)
        lengths.look_at(clip for sample in samples for clip in sample.clips())
        sizes = [self._sizes(sample, lengths) for sample in samples]
        return [tokens + heard for tokens, _, heard in sizes]

    def _batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the padded batch of samples, and where one cannot be read say which."""
        try:
            return self._padded(samples)
        except Exception as error:
            for sample in samples:
                try:
                    self._padded([sample])
                except Exception as fault:
                    kind = AudioError if isinstance(fault, AudioError) else ValueError
                    raise kind(f"{sample.source}: {one_line(fault, with_type=kind is ValueError)}") from error
            raise

    def _padded(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = _rendered(self._batching, samples)
        if self.states is not None and "input_features" in batch:
            batch["encoder_states"] = batch.pop("input_features")
        return batch

    def _refusal(self, sample: Sample, lengths: LengthsOfClips) -> RejectedError | None:
        """Return why a sample cannot be part of a batch; None if it can."""
        try:
            tokens, learned, _ = self._sizes(sample, lengths)
        except Exception as error:  # a template raises what it likes
            return RejectedError(MALFORMED, one_line(error, with_type=not isinstance(error, ValueError)))
        if not learned:
            return RejectedError(NO_ANSWER, "a text must have a token to learn, got none that the template marks")
        if self.max_tokens is not None and tokens > self.max_tokens:
            return RejectedError(TOO_MANY_TOKENS, self._too_many(tokens))
        return None

    def _too_many(self, tokens: int) -> str:
        return f"a text must have at most {self.max_tokens} tokens with its placeholders, got {tokens}"

    def _sizes(self, sample: Sample, lengths: LengthsOfClips) -> tuple[int, int, int]:
        """Return a sample's tokens with placeholders, how many of them are learned, and its clips' states that enter
        without any: those of its batch, whose clips' headers stand for them."""

        def states_of(clips: Sequence[Any], sampling_rate: int | None = None) -> tuple[list[Tensor], Tensor]:
            counts = [self.processor.state_lengths(lengths.of(clip).samples) for clip in clips]
            return [torch.empty(0)], torch.stack(counts)

        measuring = copy.copy(self.processor)
        measuring.audio_features = states_of  # type: ignore[method-assign]
        batch = _rendered(measuring, [sample])
        tokens, learned = batch["input_ids"].shape[1], int((batch["labels"] != IGNORED).sum())
        if "audio_lengths" not in batch:
            return tokens, learned, 0
        entries = by_entry(self.processor.encoders, batch["audio_lengths"][batch["audio_index"][0]].unbind(1))
        heard = sum(int(of_towers[0].sum()) for entry, of_towers in entries if entry["integration"] != "plits")
        return tokens, learned, heard


def _rendered(processor: PalProcessor, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the padded batch of samples, with labels."""
    options: dict[str, Any] = {
        "tokenize": True,
        "output_labels": True,
        "padding_side": "right",
        "padding": True,
        "truncation": False,
    }
    return dict(processor.apply_chat_template([list(sample.messages) for sample in samples], **options))


def _lengths_of(samples: Sequence[Sample]) -> LengthsOfClips:
    return samples.lengths if isinstance(samples, Samples) else LengthsOfClips()


def _packed(batch: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """Return a padded batch as one row of texts, one after another."""
    mask = batch.pop("attention_mask").bool()
    for name in ("input_ids", "labels"):
        batch[name] = batch[name][mask].unsqueeze(0)
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    batch["use_cache"] = False  # with a cache, transformers takes the row for one text
    return batch
