"""What trains in a stage, by the names that recipes have for it. Everything else is frozen.

connector   what lies between encoders and language model: the connectors, and what else is of no other part
projectors  the layers' own projections of a model with projection: per_layer
flamingo    Flamingo's gated layers
llm         the whole language model
attention   the language model but for its FFNs
lora        peft's adapters in the language model
encoders    the encoders
all         connector, projectors, flamingo and llm
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels.model.causal_lm.freezing import freeze_ffn
from palkernels.model.training.recipe import LoraRecipe, StageRecipe

__all__ = ["choose", "parameter_groups", "part_of", "trained_tensors"]

PARTS = {
    "language_model": "llm",
    "audio_tower": "encoders",
    "layer_projector": "projectors",
    "gated_layer": "flamingo",
}
ALL = ("connector", "projectors", "flamingo", "llm")


def part_of(name: str) -> str:
    """Return the part of an audio LLM that a parameter or buffer belongs to: llm, encoders, projectors, flamingo, or
    connector."""
    return PARTS.get(name.partition(".")[0], "connector")


def choose(model: PreTrainedModel, train: Sequence[str], lora: LoraRecipe) -> dict[str, list[str]]:
    """Let the parameters of the named parts train, and no others; returns their names by what ``train`` calls them.

    For "lora" adapters are put into the language model. Trained parameters of 16 bits become float32, as an optimizer's
    small steps are lost in fewer.

    Args:
        model: An audio LLM. Encoders that train must not be frozen by its config.
        train: As a stage's ``train``.
        lora: The adapters.

    Raises:
        ValueError: The model has no such part, or no module that the adapters are meant for.
    """
    # What an encoder keeps as it is, such as Whisper's positions, unless all of it is frozen.
    fixed = {name for name, x in model.named_parameters() if part_of(name) == "encoders" and not x.requires_grad}
    if model.config.freeze_encoders:
        fixed.clear()
    if "lora" in train:
        _add_adapters(model, lora)
    model.requires_grad_(False)
    if "attention" in train:
        model.language_model.requires_grad_(True)
        freeze_ffn(model.language_model)
    of_attention = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen: dict[str, list[str]] = {part: [] for part in train}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        adapter = ".lora_" in name
        if "lora" in train and adapter:
            wanted = "lora"
        elif "attention" in train and name in of_attention:
            wanted = "attention"
        elif part in train and not adapter:
            wanted = part
        elif "all" in train and part in ALL:
            wanted = "all"
        else:
            continue
        if not parameter.is_floating_point() or name in fixed:
            continue
        parameter.requires_grad_(True)
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
        chosen[wanted].append(name)
    if empty := [part for part, names in chosen.items() if not names]:
        raise ValueError(f"train must name parts that the model has, got {', '.join(map(repr, empty))} without weights")
    return chosen


def _add_adapters(model: PreTrainedModel, lora: LoraRecipe) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    _check_targets(model.language_model, lora.targets)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    inject_adapter_in_model(config, model.language_model)


def _check_targets(language_model: nn.Module, targets: Sequence[str]) -> None:
    """Raise a ValueError for a target that names nothing, or what an adapter cannot be merged into."""
    embedding: Any = language_model.get_input_embeddings()  # type: ignore[operator]
    linear = {name: x for name, x in language_model.named_modules() if isinstance(x, nn.Linear)}
    for target in targets:
        found = [x for name, x in language_model.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"lora.targets must name modules of the language model, {known}, got {target!r}")
        for module in found:
            if not isinstance(module, nn.Linear) or module.weight is embedding.weight:
                kind = "tied to the embedding" if isinstance(module, nn.Linear) else f"a {type(module).__name__}"
                raise ValueError(
                    f"lora.targets must name linear layers with weights of their own, got {target!r}, {kind}"
                )


def parameter_groups(model: nn.Module, chosen: dict[str, list[str]], stage: StageRecipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups, each with its learning rate: of every part the matrices, which decay, and the
    rest."""
    parameters = dict(model.named_parameters())
    groups = []
    for part, names in chosen.items():
        own = [parameters[name] for name in names]
        for decays in (True, False):
            of_group = [parameter for parameter in own if (parameter.ndim > 1) == decays]
            decay = stage.weight_decay if decays else 0.0
            if of_group:
                groups.append({"params": of_group, "lr": stage.lr[part], "weight_decay": decay})
    return groups


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what training changes, by name: the parameters that train, and the persistent buffers of parts that do."""
    parts = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.add(part_of(name))
            yield name, parameter
    saved = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if part_of(name) in parts and name in saved:
            yield name, buffer
