"""The command `init`: an audio LLM from trained parts in a directory, or a small one with random weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.init_options import Options, parse_encoders
from palkernels.bench.new_directory import check_new, staged
from palkernels.bench.options import dtype_name, parse_dtype
from palkernels.bench.untrained import LANGUAGE_MODEL, write_untrained
from palkernels.model import PalForConditionalGeneration, byte_tokenizer
from palkernels.model.building import assemble, build
from palkernels.model.building.encoders import entries_and_towers
from palkernels.model.encoders.weights import seeded
from palkernels.model.pal.parts import by_entry

__all__ = ["run"]


def run(options: Options) -> None:
    """Write the model to its directory, whole or not at all, and print what it is made of.

    Raises:
        UserError: the directory holds something already, or a part is not there or does not fit.
    """
    directory = options.directory
    check_new(directory)
    if (options.llm is None) != (not options.encoders):
        given, lacking = ("--encoder", "--llm") if options.llm is None else ("--llm", "--encoder")
        raise UserError(f"{lacking} must be given with {given}, got none")
    encoders = parse_encoders(options)
    settings: dict[str, Any] = {"layers": options.layers or "all", "seed": options.seed}
    dtype = None if options.dtype == "auto" else parse_dtype(options.dtype)
    if options.llm is None or not sys.stderr.isatty():
        logging.disable_progress_bar()
    random = untrained_parts(encoders, options.llm is None)
    try:
        with staged(directory) as folder:  # before what takes long, so that a folder that cannot be written says so
            if options.llm is None:
                model, processor = _small(encoders, dtype, settings)
            else:
                model, processor = build(options.llm, encoders, dtype=dtype, **settings)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            write_untrained(folder, random, options.seed)
    except (ValueError, TypeError, ImportError, OSError, SafetensorError) as error:
        raise UserError(one_line(error)) from error
    print(f"Model: {directory}", *described(model, random), sep="\n  ")


def _small(encoders: list[dict[str, Any]], dtype: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return a small audio LLM with random weights, a Llama of two layers, and its processor."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of size 32: vLLM's attention on CPUs takes no smaller ones
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(settings["seed"]):
        language_model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    entries, towers = entries_and_towers(encoders, freeze=True, seed=settings["seed"])
    if any(entry["integration"] == "flamingo" for entry in entries):
        settings = {**settings, "flamingo": {"every": 2}}  # every fourth layer, as is usual, would be none
    return assemble(language_model, tokenizer, entries, towers, **settings)


def untrained_parts(encoders: Sequence[dict[str, Any]], small: bool) -> list[str]:
    """Return the parts that no checkpoint holds."""
    parts = [LANGUAGE_MODEL] if small else []
    for entry in encoders:
        several = isinstance(entry["type"], list)
        types, checkpoints = (
            (entry["type"], entry["checkpoint"]) if several else ([entry["type"]], [entry["checkpoint"]])
        )
        parts += [f"encoder {name}" for name, path in zip(types, checkpoints, strict=True) if path is None]
    parts += [f"connector of {_title(entry)}" for entry in encoders]
    return parts + ["gated layers"] * any(entry["integration"] == "flamingo" for entry in encoders)


def described(model: PalForConditionalGeneration, random: Sequence[str]) -> list[str]:
    """Return lines that say what a model is made of."""
    config = model.config.text_config
    lines = [
        f"language model: {config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"vocabulary {config.vocab_size}, the audio token {model.config.audio_token_id}, {_size(model.language_model)}"
    ]
    entries = by_entry(model.config.encoders, list(model.audio_tower))
    for (entry, towers), connector in zip(entries, model.multi_modal_projector, strict=True):
        settings = "".join(f", {key} {value}" for key, value in entry["connector"]["config"].items())
        way = f"{entry['integration']} through {entry['connector']['type']}{settings}"
        lines.append(f"{_title(entry)}: {_size(*towers)}; {way}, {_size(connector)}")
    return [*lines, f"together: {_size(model)} in {dtype_name(model.dtype)}; untrained: {', '.join(random)}"]


def _title(entry: dict[str, Any]) -> str:
    return "+".join(entry["type"]) if isinstance(entry["type"], list) else str(entry["type"])


def _size(*modules: nn.Module) -> str:
    count = sum(weight.numel() for module in modules for weight in module.parameters())
    return f"{count / 1e6:,.1f} M parameters"
