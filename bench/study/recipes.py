"""The recipe of each run: one method and one seed, all else the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from palkernels.bench.study.contestants import CONTESTANTS
from palkernels.bench.study.settings import Settings, Where

__all__ = ["recipe", "recipe_text"]


def recipe(settings: Settings, where: Where, method: str, seed: int) -> dict[str, Any]:
    """Return the recipe of a run, in the form that `palkernels train` reads."""
    sounds = where.out / "sounds"
    steps = settings.every // settings.batch
    stages: list[dict[str, Any]] = [
        {"name": "align", "train": ["connector"], "samples": settings.align, "lr": settings.connector_lr},
    ]
    if settings.joint:
        rates = {"connector": settings.joint_lr, "llm": settings.llm_lr}
        stages.append({"name": "joint", "train": ["connector", "llm"], "samples": settings.joint, "lr": rates})
    if CONTESTANTS[method].integration == "flamingo":
        for stage in stages:  # its layers are between encoder and language model, as a connector is
            stage["train"] = [*stage["train"], "flamingo"]
            rate = stage["lr"]["connector"] if isinstance(stage["lr"], dict) else stage["lr"]
            stage["lr"] = {**(stage["lr"] if isinstance(stage["lr"], dict) else {"connector": rate}), "flamingo": rate}
    return {
        "model": CONTESTANTS[method].model(str(where.llm), str(where.encoder), settings.window_seconds),
        "data": {
            "train": [str(sounds / task / "train.jsonl") for task in settings.tasks],
            "eval": [str(sounds / task / "test.jsonl") for task in settings.tasks],
            "cache": str(where.out / "states"),
        },
        "stages": [{**stage, "batch": settings.batch, "bf16": False} for stage in stages],
        "output": str(where.out / "runs" / f"{method}-{seed}"),
        "seed": seed,
        "checkpoint": {"steps": steps},
        "log": {"steps": 5, "eval_steps": steps},
    }


def recipe_text(settings: Settings, where: Where, method: str, seed: int) -> str:
    """Return the recipe of a run as a file has it."""
    text: str = yaml.safe_dump(recipe(settings, where, method, seed), sort_keys=False, width=120)
    return text


def write_recipe(settings: Settings, where: Where, method: str, seed: int) -> Path:
    """Write a run's recipe, and return its file."""
    path = where.out / "recipes" / f"{method}-{seed}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe_text(settings, where, method, seed), encoding="utf-8")
    return path
