"""PAL: some audio tokens stand before the text, as in PLITS, and some are keys and values, as in LAL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from palkernels.bench.methods.base import Batch, Style, decoding_arguments, one_per_text
from palkernels.bench.methods.lal import Lal
from palkernels.model import AudioState

__all__ = ["PalMulti", "PalUnified"]

SUMMARY_TOKENS = 32


class PalMulti(Lal):
    """PAL with two encoders: the first half of the audio tokens stands before the text (as Whisper's would), the second
    enters as keys and values (as SSLAM's)."""

    name = "pal-multi"
    label = "PAL, two encoders"
    about = "half of the audio tokens by PLITS (Whisper), half by LAL (SSLAM); logits of the text alone"
    style = Style("#b8a03a", "<")
    step = None

    def in_sequence(self, audio_tokens: int) -> int:
        return audio_tokens // 2

    def as_keys(self, audio_tokens: int) -> int:
        return audio_tokens - audio_tokens // 2

    def parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what enters by PLITS and what by LAL, of the connector's output (A, N, d)."""
        count = self.in_sequence(states.shape[1])
        return states[:, :count], states[:, count:]

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        arguments = {"labels": batch.labels, "logits_to_keep": batch.labels.shape[1], "use_cache": False}
        loss: Tensor = model(**self.inputs(model, connector, batch), **arguments).loss
        return loss

    def inputs(self, model: Any, connector: nn.Module, batch: Batch) -> dict[str, Any]:
        text = model.get_input_embeddings()(batch.input_ids)
        before, keys = self.parts(connector(batch.states))
        inputs_embeds = torch.cat([one_per_text(before, batch), text], dim=1)
        return {"inputs_embeds": inputs_embeds, "audio": AudioState(keys, index=batch.index)}

    def generate(self, model: Any, connector: nn.Module, batch: Batch, new_tokens: int) -> Tensor:
        inputs = self.inputs(model, connector, batch)
        tokens: Tensor = model.generate(**inputs, **decoding_arguments(inputs["inputs_embeds"], new_tokens))
        return tokens


class PalUnified(PalMulti):
    """PAL with one encoder: a few tokens that sum up the audio stand before the text, all of it enters as keys and
    values."""

    name = "pal-unified"
    label = "PAL, unified"
    about = f"at most {SUMMARY_TOKENS} summary tokens by PLITS, the full sequence by LAL; logits of the text alone"
    style = Style("#0f766e", ">")

    def in_sequence(self, audio_tokens: int) -> int:
        return min(SUMMARY_TOKENS, audio_tokens)

    def as_keys(self, audio_tokens: int) -> int:
        return audio_tokens

    def parts(self, states: Tensor) -> tuple[Tensor, Tensor]:
        summary = adaptive_avg_pool1d(states.transpose(1, 2), self.in_sequence(states.shape[1]))
        return summary.transpose(1, 2), states
