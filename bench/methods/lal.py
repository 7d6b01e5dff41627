"""LAL: audio enters every layer as keys and values alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from palkernels.bench.methods.base import Batch, Method, Style, decoding_arguments, one_per_text, ones_mask
from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm.caches import CACHE_KEYWORDS
from palkernels.model.causal_lm.layers import Rotary, project_audio, rotate

__all__ = ["Lal", "LalEager"]


class Lal(Method):
    """LAL through this library: keys and values of the model's own attention, by `palkernels.model.attach`."""

    name = "lal"
    label = "LAL"
    about = "this library: audio as keys and values, no concatenation"
    style = Style("#1f5fae", "o")
    step: ClassVar[str | None] = "our kernels"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        handle = attach(model, self.config(impl))
        try:
            yield "+".join(sorted({layer.impl for layer in handle.report().layers}))
        finally:
            handle.detach()

    def config(self, impl: str) -> LalConfig:
        """Return the settings with which the model is attached."""
        return LalConfig(layers="all", rope="sequence", impl=impl)

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**self.inputs(model, connector, batch), labels=batch.labels, use_cache=False).loss
        return loss

    def inputs(self, model: Any, connector: nn.Module, batch: Batch) -> dict[str, Any]:
        """Return what a training step's forward is given besides its labels."""
        # Embedding the text first, as PLITS does, lets the backward pass free the connector's part before the
        # gradients of a tied embedding meet, which can be the peak.
        text = model.get_input_embeddings()(batch.input_ids)
        return {"inputs_embeds": text, "audio": AudioState(connector(batch.states), index=batch.index)}

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        audio = AudioState(connector(batch.states), index=batch.index)
        arguments = decoding_arguments(batch.input_ids, new_tokens)
        tokens: Tensor = model.generate(input_ids=batch.input_ids, audio=audio, **arguments)
        return tokens[:, batch.input_ids.shape[1] :]

    def as_keys(self, audio_tokens: int) -> int:
        return audio_tokens


class LalEager(Method):
    """LAL without kernels of its own, as one writes it first: each layer's modules project the audio, its keys and
    values are concatenated with the text's, and stock SDPA attends. A cache that begins with the audio's keys and
    values does just that, so the model itself is stock."""

    name = "lal-eager"
    label = "LAL, eager"
    about = "LAL without this library's kernels: the layers' modules, concatenation, SDPA with a mask"
    style = Style("#5bb5c9", "^")
    step = "the integration: audio as keys and values"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        yield f"cat + {model.config._attn_implementation}"

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        text = model.get_input_embeddings()(batch.input_ids)
        cache = self.cache(model, connector, batch)
        mask = ones_mask(len(batch.labels), batch.states.shape[1] + batch.labels.shape[1], batch.labels.device)
        arguments = {"labels": batch.labels, "attention_mask": mask, CACHE_KEYWORDS[0]: cache, "use_cache": True}
        loss: Tensor = model(inputs_embeds=text, **arguments).loss
        return loss

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        # Ids that stand for the cached audio: generate counts by them which tokens are new, and reads no more of them.
        cached = batch.input_ids.new_zeros(len(batch.input_ids), batch.states.shape[1])
        ids = torch.cat([cached, batch.input_ids], dim=1)
        cache = self.cache(model, connector, batch)
        options = {CACHE_KEYWORDS[0]: cache, **decoding_arguments(ids, new_tokens)}
        tokens: Tensor = model.generate(input_ids=ids, **options)
        return tokens[:, ids.shape[1] :]

    def as_keys(self, audio_tokens: int) -> int:
        return audio_tokens

    def cached_tokens(self, clips: int, questions: int, audio_tokens: int, question_tokens: int) -> int:
        return questions * (audio_tokens + question_tokens)  # each question's cache has its clip's keys

    def cache(self, model: Any, connector: nn.Module, batch: Batch) -> DynamicCache:
        """Return a cache with the audio's values, and its keys at positions before the text's."""
        decoder = model.get_decoder()
        states = connector(batch.states)
        rotary = Rotary(decoder.rotary_emb, decoder.config, len(decoder.layers))
        positions = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(decoder.layers):
            key, value = project_audio(layer, states)
            key = rotate(layer.self_attn, key, rotary.of_layer(index, states, positions))
            cache.update(one_per_text(key, batch), one_per_text(value, batch), index)
        return cache
