"""Rows that measuring and simulating make in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palkernels.bench.options import dtype_name
from palkernels.bench.report.document import Row
from palkernels.model.causal_lm.layers import head_dim_of

if TYPE_CHECKING:
    import torch

    from palkernels.bench.methods import Method

__all__ = ["SERVING_FIGURES", "serving_row"]

SERVING_FIGURES = ("first_token_seconds", "tokens_per_second")


def serving_row(
    method: Method, config: Any, dtype: torch.dtype, clips: int, questions: int, sizes: dict[str, int], new_tokens: int,
    first_token_seconds: float | None, other_tokens_seconds: float | None,
) -> Row:  # fmt: skip
    """Return the row of a method that answers `questions` about `clips` in one batch.

    `sizes` has the numbers of audio_tokens and text_tokens. The seconds are those of the whole batch up to its first
    token, and of its other tokens; None where there are none.
    """
    audio, text = sizes["audio_tokens"], sizes["text_tokens"]
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * dtype.itemsize
    cached = bytes_per_token * method.cached_tokens(clips, questions, audio, text + new_tokens)
    decoded, seconds = questions * (new_tokens - 1), other_tokens_seconds or 0.0  # below 0 where noise is larger
    return {
        "method": method.name,
        "clips": clips,
        "questions": questions,
        "audio_tokens": audio,
        "text_tokens": text,
        "new_tokens": new_tokens,
        "dtype": dtype_name(dtype),
        "first_token_seconds": first_token_seconds,
        "tokens_per_second": decoded / seconds if decoded and seconds > 0 else None,
        "kv_bytes_per_clip": cached // clips,
        "status": "ok",
    }
