"""What `palkernels train` does, as a file says it: the parts of a model, data, and the stages of a curriculum.

    recipe = load_recipe("recipe.yaml", ["stages.align.lr=1e-4"])

Paths in the file are relative to it, those of an override to the current directory. docs/training.md has every key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from palkernels.model.training import fields as take
from palkernels.model.training.fields import Fields
from palkernels.model.training.located import Located, RecipeError, compose, did_you_mean, override
from palkernels.model.training.model_recipe import ModelRecipe, read_model
from palkernels.model.training.source_recipe import SourceRecipe, read_sources

__all__ = ["PARTS", "DataRecipe", "LoraRecipe", "Recipe", "RecipeError", "SourceRecipe", "StageRecipe", "load_recipe"]

PARTS = ("connector", "projectors", "flamingo", "llm", "attention", "lora", "encoders", "all")
OF_THE_LLM = ("llm", "attention", "lora", "all")  # of which a stage has one at most
SCHEDULES = ("constant", "linear", "cosine")
LENGTHS = ("epochs", "steps", "samples")


@dataclass(frozen=True)
class DataRecipe:
    """What there is to learn from, and how it is read. ``check``: whether every clip is decoded once before a run
    begins, and rows with a damaged one are dropped."""

    train: tuple[SourceRecipe, ...]
    eval: tuple[SourceRecipe, ...] = ()
    max_seconds: float | None = None
    buckets: bool = True
    packing: bool = False
    max_tokens: int | None = None
    cache: str | None = None
    workers: int = 0
    check: bool = True


@dataclass(frozen=True)
class LoraRecipe:
    """peft's adapters in the language model."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class StageRecipe:
    """One stage. ``batch`` is the samples of a step, of all processes together; ``warmup`` counts steps from 1 on, and
    below 1 is a share of them."""

    name: str
    train: tuple[str, ...]
    data: tuple[str, ...]
    lr: dict[str, float]
    epochs: float | None = None
    steps: int | None = None
    samples: int | None = None
    batch: int = 8
    gradient_accumulation: int = 1
    warmup: float = 0.03
    schedule: str = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    lora: LoraRecipe = field(default_factory=LoraRecipe)


@dataclass(frozen=True)
class Recipe:
    """A whole run. ``checkpoint_steps``: after how many steps a checkpoint is written, of which the last
    ``checkpoint_keep`` stay; ``log_steps``: of how many steps a line of the log is; ``eval_steps``: after how many
    steps held-out samples are scored, besides a stage's end."""

    model: ModelRecipe
    data: DataRecipe
    stages: tuple[StageRecipe, ...]
    output: str
    seed: int = 0
    checkpoint_steps: int = 100
    checkpoint_keep: int = 2
    log_steps: int = 1
    eval_steps: int | None = None
    report_to: tuple[str, ...] = ()

    def meaning(self) -> dict[str, Any]:
        """Return what decides what is learnt, by dotted path: a run that is resumed must have the same."""
        whole = asdict(self)
        for name in ("output", "checkpoint_steps", "checkpoint_keep", "log_steps", "eval_steps", "report_to"):
            del whole[name]
        del whole["data"]["workers"]
        return _flat(whole, "")


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file, with overrides such as "stages.0.lr=1e-4".

    Raises:
        RecipeError: All that is wrong with it, each with its line. Nothing has been loaded.
    """
    file = Path(path)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise RecipeError([f"{file}: the recipe must be a file of text that can be read, got: {reason}"]) from error
    tree = compose(content, str(path), file.parent)
    faults = override(tree, overrides, Path(), rivals=LENGTHS)
    recipe = _read(tree, faults)
    if faults or recipe is None:
        raise RecipeError(sorted(dict.fromkeys(faults), key=_line))
    return recipe


def _line(fault: str) -> int:
    """Return the line of a fault's place, 0 for an override's."""
    found = re.match(r"[^\n]*?:(\d+): ", fault)
    return int(found[1]) if found else 0


def _read(tree: Located, faults: list[str]) -> Recipe | None:
    known = ("model", "data", "defaults", "stages", "output", "seed", "checkpoint", "log")
    top = Fields(tree, "", faults, known)
    if not isinstance(tree.value, dict):
        return None
    model = read_model(top, faults)
    data = _data(top, faults)
    stages = _stages(top, data, model, faults)
    output = top.read("output", take.text)
    if top.has("output"):
        output = take.path(top.items["output"], output or "")
    checkpoint = _part(top, "checkpoint", ("steps", "keep"), faults)
    log = _part(top, "log", ("steps", "eval_steps", "report_to"), faults)
    seed = top.read("seed", take.count(0), 0)
    settings: dict[str, Any] = {
        "checkpoint_steps": checkpoint.read("steps", take.count(1), 100),
        "checkpoint_keep": checkpoint.read("keep", take.count(1), 2),
        "log_steps": log.read("steps", take.count(1), 1),
        "eval_steps": log.read("eval_steps", take.count(1), None),
        "report_to": log.read("report_to", _trackers, ()),
    }
    if model is None or data is None:
        return None
    return Recipe(model, data, stages, output or "", seed, **settings)


def _part(top: Fields, name: str, known: Sequence[str], faults: list[str]) -> Fields:
    tree = top.items[name] if top.has(name) else Located({}, top.tree.place, top.tree.folder)
    return Fields(tree, name, faults, known)


def _data(top: Fields, faults: list[str]) -> DataRecipe | None:
    if not top.has("data"):
        top.wrong("data", 'must be given, got nothing: {"train": [rows.jsonl]} is the least')
        return None
    known = tuple(DataRecipe.__dataclass_fields__)
    data = Fields(top.items["data"], "data", faults, known)
    train = read_sources(data, "train", faults)
    if data.has("train") and not train:
        data.wrong("train", "must hold at least one file, got none")
    elif not data.has("train"):
        data.wrong("train", "must be given, got nothing")
    settings: dict[str, Any] = {
        "max_seconds": data.read("max_seconds", take.number(0, above=True), None),
        "buckets": data.read("buckets", take.boolean, True),
        "packing": data.read("packing", take.boolean, False),
        "max_tokens": data.read("max_tokens", take.count(1), None),
        "cache": data.read("cache", _cache, None),
        "workers": data.read("workers", take.count(0), 0),
        "check": data.read("check", take.boolean, True),
    }
    return DataRecipe(train, read_sources(data, "eval", faults), **settings)


def _trackers(value: Located) -> tuple[str, ...]:
    """Return what Trainer is to report to, each installed."""
    chosen = take.texts(value)
    known = (*INTEGRATION_TO_CALLBACK, "all", "none")
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"must name what Trainer reports to, got {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    there = (*get_available_reporting_integrations(), "all", "none")
    if absent := [name for name in chosen if name not in there]:
        raise ValueError(f"must name packages that are installed, got {absent[0]!r}: pip install {absent[0]}")
    return chosen


def _cache(value: Located) -> str | None:
    """Return the folder where encoders' states are kept; "": in the run's own; None: nowhere."""
    if isinstance(value.value, bool):
        return "" if value.value else None
    folder = take.text(value)
    if folder.lower() in ("yes", "no", "on", "off"):
        raise ValueError(f"must be true, false or a folder, got {folder!r}")
    return take.path(value, folder)


def _stages(
    top: Fields, data: DataRecipe | None, model: ModelRecipe | None, faults: list[str]
) -> tuple[StageRecipe, ...]:
    known = tuple(StageRecipe.__dataclass_fields__)
    defaults = _part(top, "defaults", [name for name in known if name != "name"], faults)
    if not top.has("stages"):
        top.wrong("stages", "must be given, got nothing: a list, each with train, lr and a length")
        return ()
    trees = take.items(top.items["stages"])
    if not trees:
        top.wrong("stages", "must hold at least one stage, got none")
    stages: list[StageRecipe] = []
    for i, tree in enumerate(trees):
        if isinstance(tree.value, dict):
            given = set(LENGTHS) & set(tree.value)
            shared = {key: item for key, item in defaults.items.items() if not (given and key in LENGTHS)}
            tree = Located({**shared, **tree.value}, tree.place, tree.folder)
        stage = Fields(tree, f"stages.{i}", faults, known)
        if isinstance(tree.value, dict):
            read = _stage(stage, i, data, model, faults)
            if read.name in [other.name for other in stages]:
                stage.wrong("name", f"must be a stage's own, got {read.name!r} again")
            stages.append(read)
    return tuple(stages)


def _stage(
    stage: Fields, number: int, data: DataRecipe | None, model: ModelRecipe | None, faults: list[str]
) -> StageRecipe:
    name = stage.read("name", take.text, f"stage{number + 1}")
    if not name.replace("-", "").replace("_", "").isalnum():
        stage.wrong("name", f"must be of letters, digits, - and _, as it names a folder, got {name!r}")
    train = stage.read("train", take.texts) or ()
    for part in train:
        if part not in PARTS:
            stage.wrong("train", f"must name parts of the model, got {part!r}{did_you_mean(part, PARTS)}")
        elif model is not None and (reason := model.why_not(part)):
            stage.wrong("train", f"must name parts that the model has, got {part!r}: {reason}")
    if len(of_llm := [part for part in train if part in OF_THE_LLM]) > 1:
        stage.wrong("train", f"must name one of {', '.join(OF_THE_LLM)} at most, got {' and '.join(of_llm)}")
    if stage.has("train") and not train:
        stage.wrong("train", "must name at least one part, got none")
    names = tuple(dict.fromkeys(source.name for source in data.train)) if data is not None else ()
    chosen = stage.read("data", take.texts, names)
    for unknown in [group for group in chosen if data is not None and group not in names]:
        stage.wrong("data", f"must name data to train on, got {unknown!r}{did_you_mean(unknown, names)}")
    lengths = [key for key in LENGTHS if stage.has(key)]
    if len(lengths) > 1:
        stage.wrong(lengths[1], f"must not be given with {lengths[0]}: one of {', '.join(LENGTHS)} says how long it is")
    batch, pieces = stage.read("batch", take.count(1), 8), stage.read("gradient_accumulation", take.count(1), 1)
    if batch % pieces:
        stage.wrong("batch", f"must be a multiple of gradient_accumulation, {pieces}, got {batch}")
    return StageRecipe(
        name,
        tuple(train),
        tuple(chosen),
        _rates(stage, train, faults),
        stage.read("epochs", take.number(0, above=True), None if lengths else 1.0),
        stage.read("steps", take.count(1), None),
        stage.read("samples", take.count(1), None),
        batch,
        pieces,
        stage.read("warmup", take.number(0), 0.03),
        stage.read("schedule", take.choice(*SCHEDULES), "cosine"),
        stage.read("clip", take.number(0), 1.0),
        stage.read("weight_decay", take.number(0), 0.0),
        stage.read("gradient_checkpointing", take.boolean, False),
        stage.read("bf16", take.boolean, None),
        _lora(stage, train, faults),
    )


def _rates(stage: Fields, train: Sequence[str], faults: list[str]) -> dict[str, float]:
    """Return the learning rate of each part."""
    rate = take.number(0, above=True)
    if not stage.has("lr") or not isinstance(stage.items["lr"].value, dict):
        return dict.fromkeys(train, stage.read("lr", rate))
    rates = Fields(stage.items["lr"], f"{stage.path}.lr", faults, train)
    return {part: rates.read(part, rate) for part in train}


def _lora(stage: Fields, train: Sequence[str], faults: list[str]) -> LoraRecipe:
    if not stage.has("lora"):
        return LoraRecipe()
    lora = Fields(stage.items["lora"], f"{stage.path}.lora", faults, tuple(LoraRecipe.__dataclass_fields__))
    return LoraRecipe(
        lora.read("r", take.count(1), 16),
        lora.read("alpha", take.number(0, above=True), 32.0),
        lora.read("dropout", take.number(0, 0.99), 0.0),
        lora.read("targets", take.texts, LoraRecipe().targets),
    )


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict | list | tuple) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            name: x for key, item in pairs for name, x in _flat(item, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: list(value) if isinstance(value, tuple) else value}
