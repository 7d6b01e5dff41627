"""What an evaluation finds: answers, figures by task, and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from palkernels.model.data import Dropped

__all__ = ["Answer", "Score", "Scores", "TaskScores"]


@dataclass(frozen=True)
class Answer:
    """What a model said to a sample.

    Attributes:
        source, task: the sample's.
        question: what was asked, with ``<audio>`` for each clip.
        reference: what it should have said.
        answer: what it said, by greedy generation.
        correct: whether both are the same, case and punctuation at the ends of words aside.
        complete: whether the answer ended; else it was cut at the most new tokens.
        likelihoods: the logarithm of the probability of each choice as the whole answer; empty for an open question.
        chosen: the most probable choice.
    """

    source: str
    task: str
    question: str
    reference: str
    answer: str
    correct: bool
    complete: bool
    likelihoods: Mapping[str, float]
    chosen: str | None = None


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        metric: its name.
        count: how many samples it is of.
        value: a share, or for ``bleu`` and ``chrf`` a figure of 0 to 100.
        low, high: the 95 % interval; None where one sample tells none.
        signature: how sacrebleu computes it; "" for others.
    """

    metric: str
    count: int
    value: float
    low: float | None
    high: float | None
    signature: str = ""


@dataclass(frozen=True)
class TaskScores:
    """The figures of a task, or with the task None of all samples together."""

    task: str | None
    count: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        tasks: in the order in which the samples have them.
        overall: every metric over all samples that it was asked of.
        answers: in the order of the samples.
        dropped: the samples that were not scored.
        settings: how they were asked.
        versions: of the packages that matter.
    """

    tasks: tuple[TaskScores, ...]
    overall: TaskScores
    answers: tuple[Answer, ...]
    dropped: tuple[Dropped, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def incomplete(self) -> int:
        """How many answers were cut at the most new tokens."""
        return sum(not answer.complete for answer in self.answers)

    def document(self) -> dict[str, Any]:
        """Return all but the answers in JSON's types."""
        return {
            "tasks": {str(of_task.task): _figures(of_task) for of_task in self.tasks},
            "overall": _figures(self.overall),
            "incomplete_answers": self.incomplete,
            "dropped": [asdict(dropped) for dropped in self.dropped],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


def _figures(of_task: TaskScores) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    for score in of_task.scores:
        interval = None if score.low is None else [score.low, score.high]
        figures[score.metric] = {"value": score.value, "interval_95": interval, "samples": score.count}
        if score.signature:
            figures[score.metric]["signature"] = score.signature
    return {"samples": of_task.count, "metrics": figures}
