"""PLITS: the connector's output stands before the text and passes every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import avg_pool1d

from palkernels.bench.instruments.backends import fastest_backend
from palkernels.bench.methods.base import IGNORED_LABEL, Batch, Method, Style, decoding_arguments, one_per_text

__all__ = ["POOLED", "Plits", "PlitsPooled", "PlitsTuned"]

POOLED = 4  # audio tokens that are averaged to one


class Plits(Method):
    """The baseline, in stock code."""

    name = "plits"
    label = "PLITS"
    about = "audio tokens before the text; stock Hugging Face: SDPA, loss over logits of the whole sequence"
    style = Style("#c0392b", "s")
    is_baseline = True
    step: ClassVar[str | None] = ""

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        yield str(model.config._attn_implementation)

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        inputs_embeds = self.embeds(model, connector, batch)
        audio_labels = batch.labels.new_full(
            (len(batch.labels), inputs_embeds.shape[1] - batch.labels.shape[1]), IGNORED_LABEL
        )
        labels = torch.cat([audio_labels, batch.labels], dim=1)
        loss: Tensor = model(inputs_embeds=inputs_embeds, labels=labels, use_cache=False).loss
        return loss

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        inputs_embeds = self.embeds(model, connector, batch)
        # With embeddings alone, generate returns the new tokens only.
        tokens: Tensor = model.generate(inputs_embeds=inputs_embeds, **decoding_arguments(inputs_embeds, new_tokens))
        return tokens

    def embeds(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        """Return the embeddings of audio and text (B, audio and text tokens, d)."""
        text = model.get_input_embeddings()(batch.input_ids)
        return torch.cat([one_per_text(self.connected(connector, batch.states), batch), text], dim=1)

    def connected(self, connector: nn.Module, states: Tensor) -> Tensor:
        """Return what the connector makes of encoder states (A, N, width): audio tokens (A, N, d)."""
        tokens: Tensor = connector(states)
        return tokens

    def in_sequence(self, audio_tokens: int) -> int:
        return audio_tokens

    def with_logits(self, audio_tokens: int, text_tokens: int) -> int:
        return text_tokens + self.in_sequence(audio_tokens)


class PlitsTuned(Plits):
    """PLITS at its best: logits of the text alone, and the attention backend that is fastest here, pinned."""

    name = "plits-tuned"
    label = "PLITS, tuned"
    about = "PLITS with logits of the text alone and the fastest SDPA backend pinned"
    style = Style("#e08e2b", "D", (0, (2, 2)))  # dashed: in inference it lies on PLITS, which must be seen under it
    is_baseline = True
    step = "the baseline's logits and attention backend"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        backend = fastest_backend(model)
        with sdpa_kernel(backend):
            yield f"sdpa ({backend.name.removesuffix('_ATTENTION').lower()})"

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        inputs_embeds, text_tokens = self.embeds(model, connector, batch), batch.labels.shape[1]
        arguments = {"labels": batch.labels, "logits_to_keep": text_tokens, "use_cache": False}
        loss: Tensor = model(inputs_embeds=inputs_embeds, **arguments).loss
        return loss

    def with_logits(self, audio_tokens: int, text_tokens: int) -> int:
        return text_tokens


class PlitsPooled(Plits):
    """PLITS with fewer tokens: the encoder's states are averaged before the connector, as many audio LLMs do."""

    name = "plits-pooled"
    label = f"PLITS, pooled {POOLED}:1"
    about = f"PLITS with {POOLED} audio tokens averaged to one, otherwise stock"
    style = Style("#8d6e63", "v")
    is_baseline = False
    step = None

    def connected(self, connector: nn.Module, states: Tensor) -> Tensor:
        pooled = avg_pool1d(states.transpose(1, 2), POOLED, ceil_mode=True, count_include_pad=False)
        return super().connected(connector, pooled.transpose(1, 2))

    def in_sequence(self, audio_tokens: int) -> int:
        return -(-audio_tokens // POOLED)
