"""Generated sound for tests: a stand-in for espeak-ng, and what a folder of it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from palkernels.bench.study.sounds.tasks import Task

SECONDS = 0.4


class Hum:
    """Speaks every text as one hum, and remembers what it was asked for."""

    rate = 22_050

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def speak(self, text: str, voice: str, *, rate: int, pitch: int, range: int) -> Any:
        self.said.append((text, voice))
        return 0.5 * np.sin(np.arange(round(SECONDS * self.rate)) * 0.05)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def voices(facts: Any) -> set[str]:
    """The variants that an item was spoken with."""
    return {facts[key].partition("+")[2] for key in ("voice", "second") if "+" in str(facts.get(key, ""))}


def combination(task: Task, answer: str, facts: Any) -> tuple[Any, ...]:
    """What training must not hear of an item whose combination is new."""
    if task.name in ("words", "voices"):
        return answer, facts["voice"].partition("+")[0]
    if task.name == "languages":
        return answer, sum(map(int, facts["number"]))
    if task.name == "numbers":
        return (sum(map(int, answer)),)
    if task.name == "phrases":
        return (answer,)
    if task.name == "timbre":
        return answer, facts["register"]
    keys = {"direction": ("register", "interval"), "count": ("tempo", "register")}
    return tuple(facts[key] for key in keys.get(task.name, ("first", "second")))


def nearest_centroid(train: Any, test: Any) -> float:
    """The accuracy of the nearest centroid: each of `train` and `test` is a list of (features, answer)."""
    answers = sorted({answer for _, answer in train})
    features, of = np.array([row for row, _ in train]), np.array([answer for _, answer in train])
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    centroids = np.stack([((features[of == answer] - mean) / deviation).mean(axis=0) for answer in answers])
    guesses = [np.argmin(np.linalg.norm((row - mean) / deviation - centroids, axis=1)) for row, _ in test]
    return float(np.mean([answers[guess] == answer for guess, (_, answer) in zip(guesses, test, strict=True)]))
