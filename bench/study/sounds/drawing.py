"""Which item stands where: each is drawn by itself, from the seed, its task, its split and its place."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from palkernels.bench.study.sounds.tasks import Draw, Item, Speech, Task, pick

__all__ = ["SPLITS", "Question", "question"]

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Question:
    """An item, its wording, and whether it is of the combinations that training never hears."""

    item: Item
    text: str
    new: bool


def question(task: Task, split: str, place: int, seed: int, speech: Speech | None) -> Question:
    """Return what stands at a place of a split. It does not depend on how many there are.

    Answers are balanced: each run of as many places as there are choices has every choice once. Every second item of
    the test split is of a combination that training never hears, where the task has such.
    """
    stream = (seed, zlib.crc32(task.name.encode()), SPLITS.index(split))
    answer = ""
    if task.choices:
        run, within = divmod(place, len(task.choices))
        answer = task.choices[int(np.random.default_rng((*stream, 0, run)).permutation(len(task.choices))[within])]
    rng = np.random.default_rng((*stream, 1, place))
    test = split == "test"
    new = test and task.combinations and place % 2 == 1
    item = task.make(Draw(rng, test=test, new=new, answer=answer, speech=speech))
    return Question(item, pick(rng, task.questions[item.asked]), new)
