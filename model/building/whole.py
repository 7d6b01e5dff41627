"""A whole audio LLM from the checkpoints of its parts.

    model, processor = build(
        "HuggingFaceTB/SmolLM2-135M-Instruct",                  # or a directory, or a .gguf file
        [{"type": "whisper", "checkpoint": "whisper-tiny.en", "integration": "lal", "connector": {"type": "mlp"}}],
    )
    model.save_pretrained("my-model")
    processor.save_pretrained("my-model")

Trained weights stay what they were, bit by bit; what no checkpoint holds, connectors above all, is drawn from the seed.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from palkernels.model.building.encoders import entries_and_towers
from palkernels.model.building.language_models import load_language_model
from palkernels.model.building.layers import parse_layers
from palkernels.model.building.vocabulary import add_audio_token
from palkernels.model.encoders.weights import seeded
from palkernels.model.pal import PalForConditionalGeneration, PalProcessor
from palkernels.model.pal.parts import check_settings
from palkernels.model.pal.tokenizer import AUDIO_TOKEN

__all__ = ["assemble", "build"]


def build(
    llm: str | os.PathLike[str],
    encoders: Sequence[dict[str, Any]],
    *,
    layers: Any = "all",
    audio_token: str = AUDIO_TOKEN,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[PalForConditionalGeneration, PalProcessor]:
    """Return an audio LLM of trained parts, and its processor. Its connectors are untrained.

    Args:
        llm: the language model: a directory as ``save_pretrained`` writes it, a name on the hub, or a .gguf file.
        encoders: one entry each: {"type": "whisper", "clap" or "sslam", "checkpoint": a directory, or None for random
            weights, "integration": "lal" (the default), "plits" or "flamingo", "connector": {"type": "mlp" (the
            default), "qformer" or "lfst", and the connector's settings}}. LFST's entry has lists: "type": ["sslam",
            "clap"] and "checkpoint". An encoder with random weights may have the "config" that gives its shape,
            Whisper's one with {"window_seconds": ...} in any case.
        layers: the layers that LAL's audio enters: "all", their numbers, or text such as "4-15", "4-" or "0,2,4".
        audio_token: the token that stands in a text for a clip. The tokenizer gets it if it has none, the embeddings
            a row; and a tokenizer without a chat template gets ``PLAIN_TEMPLATE``, one without padding its end of text.
        dtype: of all weights, or its name; None: the language model's checkpoint's, which for a .gguf file is float32.
        seed: of all random weights.
        settings: the other arguments of :class:`PalConfig`, such as ``freeze_encoders`` and ``summary_tokens``.

    Raises:
        TypeError, ValueError: a part is not there, is damaged, or does not fit the others.
        ImportError: a .gguf file needs packages that are not installed.
    """
    check_settings(settings)
    freeze = settings.get("freeze_encoders", True)
    entries, towers = entries_and_towers(encoders, freeze, seed)  # before the language model, which takes longest
    with seeded(seed):
        language_model, tokenizer = load_language_model(llm, dtype)
    return assemble(
        language_model, tokenizer, entries, towers, layers=layers, audio_token=audio_token, seed=seed, **settings
    )


def assemble(
    language_model: PreTrainedModel,
    tokenizer: Any,
    encoders: Sequence[dict[str, Any]],
    towers: Sequence[Any] | None = None,
    *,
    layers: Any = "all",
    audio_token: str = AUDIO_TOKEN,
    seed: int = 0,
    **settings: Any,
) -> tuple[PalForConditionalGeneration, PalProcessor]:
    """Return an audio LLM around a language model and a tokenizer, which are changed, and its processor.

    Args:
        language_model, towers: as in ``PalForConditionalGeneration.from_parts``.
        encoders: entries as in :class:`PalConfig`.
        tokenizer, layers, audio_token, seed, settings: as in :func:`build`.

    Raises:
        TypeError, ValueError: the parts do not fit each other.
    """
    layers = parse_layers(layers, language_model.config.get_text_config().num_hidden_layers)
    with seeded(seed):
        token_id = add_audio_token(language_model, tokenizer, audio_token, torch.default_generator)
        model = PalForConditionalGeneration.from_parts(
            language_model, encoders, towers, layers=layers, audio_token_id=token_id, **settings
        )
    return model.eval(), PalProcessor.from_config(tokenizer, model.config, audio_token=audio_token)
