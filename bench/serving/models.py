"""The models that are served: a preset's language model with random weights, saved for LAL and for PLITS alike, or
saved audio LLMs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.options import parse_dtype
from palkernels.bench.presets import PRESETS, plan_llm
from palkernels.bench.serving.settings import Options
from palkernels.model import byte_tokenizer
from palkernels.model.building import assemble
from palkernels.model.encoders.whisper import WHISPER_SIZES, WhisperTower

__all__ = ["Served", "dtype_of", "served_models"]

METHODS = ("plits", "lal")
LONGEST_WINDOW = 30.0  # Whisper's, in seconds


@dataclass(frozen=True)
class Served:
    """A saved audio LLM.

    Attributes:
        name: What results call it: plits and lal, or its directory's name.
        directory: Where it is.
        tokens: The most that a request of the load has, answer included; None: what its config holds.
    """

    name: str
    directory: Path
    tokens: int | None = None


def dtype_of(options: Options) -> torch.dtype:
    """Return the dtype of weights and computation; auto is bfloat16 on a GPU and float32 on a CPU."""
    if options.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return parse_dtype(options.dtype)


def served_models(options: Options, folder: Path) -> list[Served]:
    """Return what is served in turn, models with random weights written to a folder.

    Raises:
        UserError: a preset or an encoder is unknown, or a directory holds no audio LLM.
    """
    presets = [name for name in options.models if name in PRESETS]
    if presets and len(options.models) > 1:
        raise UserError(f"--model must be one preset or directories, got {', '.join(options.models)}")
    if presets:
        return [_written(presets[0], method, options, folder / method) for method in METHODS]
    found = [_saved(Path(name)) for name in options.models]
    if len({model.name for model in found}) < len(found):
        raise UserError(f"--model must be directories of different names, got {', '.join(options.models)}")
    return found


def _saved(directory: Path) -> Served:
    try:
        kind = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        presets = ", ".join(PRESETS)
        raise UserError(
            f"--model must be {presets} or a saved audio LLM, got {str(directory)!r}: {one_line(error)}"
        ) from error
    if kind != "pal":
        raise UserError(f"--model must be a saved audio LLM, got one of type {kind} in {str(directory)!r}")
    return Served(directory.resolve().name, directory)


def _written(preset: str, method: str, options: Options, directory: Path) -> Served:
    if options.encoder not in WHISPER_SIZES:
        raise UserError(f"--encoder must be one of {', '.join(WHISPER_SIZES)}, got {options.encoder!r}")
    plan = plan_llm(preset, None)
    tokenizer = byte_tokenizer()
    # What a server takes from a config: where an answer ends, which this tokenizer has elsewhere than the preset's own.
    plan.config.bos_token_id, plan.config.eos_token_id = None, tokenizer.eos_token_id
    plan.config.pad_token_id = tokenizer.pad_token_id
    language_model = plan.build(dtype_of(options), torch.device("cpu"), options.seed).model
    language_model.generation_config.bos_token_id = None
    window = min(LONGEST_WINDOW, round(options.seconds / 0.02) * 0.02)
    settings: dict[str, Any] = {**WHISPER_SIZES[options.encoder], "window_seconds": round(window, 2)}
    tower = WhisperTower(seed=options.seed, **settings).to(dtype_of(options))
    entry = {"type": "whisper", "config": settings, "integration": method, "connector": {"type": "mlp"}}
    logging.disable_progress_bar()
    model, processor = assemble(language_model, tokenizer, [entry], [tower], seed=options.seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    audio = int(options.seconds / 0.02) + 2
    return Served(method, directory, audio + options.characters + options.new_tokens + 128)
