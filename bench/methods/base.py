"""What a method is and what every method is given.

Every method gets the same encoder states, text, labels and weights, and has its part of the work done by the same
connector. A method runs on a stock Hugging Face model: `ready` turns the model into what the method needs, and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["IGNORED_LABEL", "MODES", "Batch", "Method", "Style", "decoding_arguments", "one_per_text", "ones_mask"]

MODES = ("train", "infer")
IGNORED_LABEL = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Style:
    """How a method looks in plots, in matplotlib's terms."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]] = "-"  # a line style, or an offset and the lengths of dashes and gaps


@dataclass(frozen=True)
class Batch:
    """One batch on its device."""

    states: Tensor  # (A, N, encoder's width): the encoder's output
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T); IGNORED_LABEL for the first token, which only PLITS could predict
    index: Tensor | None = None  # (B,): the clip that each text is about; None: A == B, text b is about clip b

    @classmethod
    def make(
        cls, clip: Tensor, texts: int, text_tokens: int, vocab_size: int, seed: int, clips: int | None = None
    ) -> Batch:
        """Return a batch of random texts about copies of one clip.

        Args:
            clip: the clip's encoder states (N, width).
            texts: number of texts.
            text_tokens: tokens of each text.
            vocab_size: token ids are drawn below it.
            seed: seed of the token ids.
            clips: number of copies of the clip, each shared by as many texts; None: one for each text.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (texts, text_tokens), generator=generator).to(clip.device)
        labels = ids.clone()
        labels[:, 0] = IGNORED_LABEL
        index = None if clips is None else torch.arange(texts, device=clip.device) * clips // texts
        return cls(clip.repeat(texts if clips is None else clips, 1, 1), ids, labels, index)


class Method(ABC):
    """One way of putting audio into the language model."""

    name: ClassVar[str]  # on the command line and in results
    label: ClassVar[str]  # in tables and plots
    about: ClassVar[str]  # one line for readers of a report
    style: ClassVar[Style]
    modes: ClassVar[tuple[str, ...]] = MODES
    in_figure1: ClassVar[bool] = True  # among the methods that Figure 1 compares
    is_lever: ClassVar[bool] = False  # saves more training memory at a price, and is held against "lal"
    is_baseline: ClassVar[bool] = False  # what LAL is held against
    # The waterfall goes from the baseline to LAL in steps, each from one method to the next in the registry's order.
    # What the step to this method brings; "" for the first method, None for a method outside of the waterfall.
    step: ClassVar[str | None] = None

    def why_not(self, device: torch.device) -> str | None:
        """Return in a few words why the method cannot run on a device, or None if it can."""
        return None

    @abstractmethod
    def ready(self, model: Any, impl: str = "auto") -> AbstractContextManager[str]:
        """Return a context in which the model is usable with this method; it yields the name of the attention that
        runs. `impl` is the implementation of this library's functions."""

    @abstractmethod
    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss; called inside `ready`."""

    @abstractmethod
    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        """Return exactly `new_tokens` greedily decoded tokens, (B, new_tokens); called inside `ready`."""

    def added_parameters(self, model: Any) -> list[nn.Parameter]:
        """Return the parameters that the method adds to the model and trains; called inside `ready`, which makes them
        anew."""
        return []

    def in_sequence(self, audio_tokens: int) -> int:
        """Return how many of a clip's audio tokens pass whole layers."""
        return 0

    def as_keys(self, audio_tokens: int) -> int:
        """Return how many of a clip's audio tokens are keys and values alone."""
        return 0

    def with_logits(self, audio_tokens: int, text_tokens: int) -> int:
        """Return how many tokens of a training sample get logits."""
        return text_tokens

    def cached_tokens(self, clips: int, questions: int, audio_tokens: int, question_tokens: int) -> int:
        """Return for how many tokens the model's layers keep keys and values, for questions of `question_tokens` tokens
        (text and answer) about clips of `audio_tokens` tokens. Questions share their clip's keys."""
        return clips * self.as_keys(audio_tokens) + questions * (self.in_sequence(audio_tokens) + question_tokens)


def one_per_text(per_clip: Tensor, batch: Batch) -> Tensor:
    """Return a tensor (A, ...) with one entry per clip as (B, ...), with one entry per text."""
    return per_clip if batch.index is None else per_clip.index_select(0, batch.index)


def ones_mask(texts: int, tokens: int, device: torch.device) -> Tensor:
    """Return an attention mask (texts, tokens) that hides nothing."""
    return torch.ones(texts, tokens, dtype=torch.long, device=device)


def decoding_arguments(prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    """Return the arguments with which `generate` decodes greedily after a prompt of ids (B, S) or embeddings (B, S, d).

    Without a mask, generate would take random tokens that equal pad_token_id for padding. The pad token itself is never
    used; naming one silences a warning.
    """
    mask = ones_mask(prompt.shape[0], prompt.shape[1], prompt.device)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    return {"attention_mask": mask, **settings}
