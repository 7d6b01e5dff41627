"""What is compared: one class per way of putting audio into the language model.

Every method gets the same encoder states, text, labels and weights, and has its own part of the work done by
the same connector. A method runs on a stock Hugging Face model, which `ready` turns into what it needs and
back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from palkernels.model import AudioState, LalConfig, attach

__all__ = ["METHODS", "Batch", "Lal", "Method", "Plits"]

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Batch:
    """One batch on its device."""

    states: Tensor  # (B, N, encoder's width): what the encoder gave
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T); IGNORED for the first token, which only PLITS could predict

    @classmethod
    def make(cls, clip: Tensor, rows: int, text_tokens: int, vocab_size: int, seed: int) -> Batch:
        """`rows` copies of one clip's states (N, width), each with its own random text."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (rows, text_tokens), generator=generator).to(clip.device)
        labels = ids.clone()
        labels[:, 0] = IGNORED
        return cls(clip.repeat(rows, 1, 1), ids, labels)


class Method(ABC):
    """One way of putting audio into the language model."""

    name: ClassVar[str]  # on the command line and in results
    label: ClassVar[str]  # in tables and plots
    audio_in_sequence: ClassVar[bool]  # whether audio tokens pass whole layers, or only key and value projections

    @abstractmethod
    def ready(self, model: Any) -> AbstractContextManager[str]:
        """Make the model usable with this method; yields the name of the attention that runs."""

    @abstractmethod
    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        """The training loss; called inside `ready`."""

    @abstractmethod
    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        """Greedy decoding of exactly `new_tokens` tokens, (B, new_tokens); called inside `ready`."""


class Plits(Method):
    """The baseline: connector outputs stand before the text and pass every layer. Stock code."""

    name = "plits"
    label = "PLITS"
    audio_in_sequence = True

    @contextmanager
    def ready(self, model: Any) -> Iterator[str]:
        yield str(model.config._attn_implementation)

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        audio_labels = batch.labels.new_full(batch.states.shape[:2], IGNORED)
        labels = torch.cat([audio_labels, batch.labels], dim=1)
        inputs_embeds = _joined(model, connector, batch)
        loss: Tensor = model(inputs_embeds=inputs_embeds, labels=labels, use_cache=False).loss
        return loss

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        inputs_embeds = _joined(model, connector, batch)
        # With embeddings alone, generate returns the new tokens only.
        tokens: Tensor = model.generate(inputs_embeds=inputs_embeds, **_decoding(inputs_embeds, new_tokens))
        return tokens


class Lal(Method):
    """Audio as keys and values of the model's own attention, through `palkernels.model.attach`."""

    name = "lal"
    label = "LAL"
    audio_in_sequence = False

    @contextmanager
    def ready(self, model: Any) -> Iterator[str]:
        handle = attach(model, LalConfig(layers="all", rope="sequence", impl="auto"))
        try:
            yield "+".join(sorted({layer.impl for layer in handle.report().layers}))
        finally:
            handle.detach()

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        # Embedding the text first, as PLITS does, lets the backward pass free the connector's part before the
        # gradients of a tied embedding meet, which can be the peak.
        text = model.get_input_embeddings()(batch.input_ids)
        audio = AudioState(connector(batch.states))
        loss: Tensor = model(inputs_embeds=text, labels=batch.labels, audio=audio, use_cache=False).loss
        return loss

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        audio = AudioState(connector(batch.states))
        tokens: Tensor = model.generate(
            input_ids=batch.input_ids, audio=audio, **_decoding(batch.input_ids, new_tokens)
        )
        return tokens[:, batch.input_ids.shape[1] :]


METHODS: dict[str, Method] = {method.name: method for method in (Plits(), Lal())}


def _joined(model: Any, connector: nn.Module, batch: Batch) -> Tensor:
    text = model.get_input_embeddings()(batch.input_ids)
    return torch.cat([connector(batch.states), text], dim=1)


def _decoding(prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    # pad_token_id is never used, and silences a warning about its absence. Without a mask, generate would take the
    # random text's tokens of that number for padding.
    mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    return {"attention_mask": mask, **settings}
