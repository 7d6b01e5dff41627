"""Metrics: how answers become a figure, and which of them a task is scored by.

=======  =====================================================================================  ===================
choice   share of samples whose most probable choice is the reference                           samples with choices
exact    share of answers that are the reference, after :func:`normalised`                      all
wer      errors by words of the references, after :func:`normalised`; jiwer                     all
cer      errors by characters, likewise, for languages without blanks; jiwer                    all
bleu     BLEU of all answers together, small letters; sacrebleu                                 all
chrf     chrF2, likewise; sacrebleu                                                             all
=======  =====================================================================================  ===================
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from palkernels.errors import one_line
from palkernels.model.evaluation.intervals import RESAMPLES, ratio_interval, wilson_interval
from palkernels.model.evaluation.normalisation import normalised, words
from palkernels.model.evaluation.questions import Question
from palkernels.model.evaluation.scores import Answer, Score

__all__ = ["METRICS", "Metric", "chosen_metrics", "packages_of"]

SHORT = 5  # words of an answer that is compared as a whole
TRANSCRIPTS = re.compile(r"\b(transcri|asr\b|stt\b)")  # in a task's name
CAPTIONS = re.compile(r"\bcaption")


@dataclass(frozen=True)
class Metric:
    """A way to make a figure of answers.

    Attributes:
        title: what tables call it.
        score: from the answers that it is asked of, at least one, to the figure.
        share: whether the figure is a share; else it goes from 0 to 100.
        package: what it needs to be installed; None: nothing.
    """

    name: str
    title: str
    score: Callable[[Sequence[Answer]], Score]
    share: bool = True
    package: str | None = None

    def check_installed(self) -> None:
        """Check that what the metric needs is installed.

        Raises:
            ModuleNotFoundError: it is not; the message says what to install.
        """
        if self.package is not None:
            _package(self.package, self.name)


def chosen_metrics(
    questions: Sequence[Question], asked: Mapping[str, Sequence[str]] | Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """Return the names of the metrics of each task, in the order of the questions.

    Args:
        questions: all that will be asked.
        asked: metrics for all tasks, or some by task. Other tasks get theirs by a rule:

            - where samples have choices, "choice" and "exact";
            - a name with "transcri", "asr" or "stt" as a word or its beginning, "wer"; one with "caption", "bleu" and
              "chrf";
            - otherwise "exact" where at least half of the references are of at most five words, else "bleu" and "chrf".

    Raises:
        ValueError: a metric or task is unknown, or "choice" is asked of a task in which a sample has none.
    """
    tasks: dict[str, list[Question]] = {}
    for question in questions:
        tasks.setdefault(question.sample.task, []).append(question)
    by_task = asked if isinstance(asked, Mapping) else {} if asked is None else dict.fromkeys(tasks, asked)
    for task, names in by_task.items():
        if task not in tasks:
            known = ", ".join(map(repr, tasks))
            raise ValueError(f"metrics must be given for a task of the samples, {known}, got {task!r}")
        if not names or isinstance(names, str) or any(name not in METRICS for name in names):
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {names!r} for the task {task!r}")
        without = [question.sample.source for question in tasks[task] if not question.sample.choices]
        if "choice" in names and without:
            raise ValueError(f"the metric choice must be of samples with choices, got {without[0]} without any")
    found = {task: tuple(dict.fromkeys(by_task.get(task) or _fitting(task, tasks[task]))) for task in tasks}
    for name in dict.fromkeys(name for names in found.values() for name in names):
        METRICS[name].check_installed()
    return found


def packages_of(names: Sequence[str]) -> list[str]:
    """Return the packages that compute these metrics."""
    return sorted({package for name in names if (package := METRICS[name].package) is not None})


def _fitting(task: str, questions: Sequence[Question]) -> tuple[str, ...]:
    name = task.casefold().replace("_", " ")
    if any(question.sample.choices for question in questions):
        return "choice", "exact"
    if TRANSCRIPTS.search(name):
        return ("wer",)
    if CAPTIONS.search(name):
        return "bleu", "chrf"
    short = median(len(words(question.reference)) for question in questions) <= SHORT
    return ("exact",) if short else ("bleu", "chrf")


def _choice(answers: Sequence[Answer]) -> Score:
    with_choices = [answer for answer in answers if answer.chosen is not None]
    right = [normalised(answer.chosen or "") == normalised(answer.reference) for answer in with_choices]
    return _proportion("choice", right)


def _exact(answers: Sequence[Answer]) -> Score:
    return _proportion("exact", [answer.correct for answer in answers])


def _proportion(name: str, right: Sequence[bool]) -> Score:
    hits, count = sum(right), len(right)
    return Score(name, count, hits / count, *wilson_interval(hits, count))


def _word_errors(answers: Sequence[Answer]) -> Score:
    return _error_rate("wer", "process_words", answers)


def _character_errors(answers: Sequence[Answer]) -> Score:
    return _error_rate("cer", "process_characters", answers)


def _error_rate(name: str, process: str, answers: Sequence[Answer]) -> Score:
    """Return the substitutions, deletions and insertions of all answers, by the length of all references."""
    count = getattr(_package("jiwer", name), process)
    counts = [count(normalised(answer.reference), normalised(answer.answer)) for answer in answers]
    errors = [each.substitutions + each.deletions + each.insertions for each in counts]
    lengths = [each.substitutions + each.deletions + each.hits for each in counts]
    if not sum(lengths):
        raise ValueError(f"the metric {name} must be of references with words in them, got none")
    low, high = ratio_interval(errors, lengths) or (None, None)
    return Score(name, len(answers), sum(errors) / sum(lengths), low, high)


def _bleu(answers: Sequence[Answer]) -> Score:
    return _overlap("bleu", "BLEU", answers)


def _chrf(answers: Sequence[Answer]) -> Score:
    return _overlap("chrf", "CHRF", answers)


def _overlap(name: str, computed_by: str, answers: Sequence[Answer]) -> Score:
    """Return a figure of sacrebleu's, with its interval by bootstrap."""
    metric = getattr(_package("sacrebleu", name), computed_by)(lowercase=True)
    said, references = [answer.answer for answer in answers], [answer.reference for answer in answers]
    resamples = RESAMPLES if len(answers) > 1 else 1
    outcome = metric.corpus_score(said, [references], n_bootstrap=resamples)
    signature = str(metric.get_signature())
    if len(answers) == 1:
        return Score(name, 1, outcome.score, None, None, signature)
    told = json.loads(outcome.format(width=6, is_json=True, signature=signature))
    mean, half = told["confidence_mean"], told["confidence_var"]
    return Score(name, len(answers), outcome.score, max(0.0, mean - half), min(100.0, mean + half), signature)


def _package(package: str, metric: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"the metric {metric} needs {package}: pip install 'palkernels[evaluate]' ({one_line(error)})", name=package
        ) from error


METRICS = {
    metric.name: metric
    for metric in (
        Metric("choice", "choice", _choice),
        Metric("exact", "exact match", _exact),
        Metric("wer", "word errors", _word_errors, package="jiwer"),
        Metric("cer", "character errors", _character_errors, package="jiwer"),
        Metric("bleu", "BLEU", _bleu, share=False, package="sacrebleu"),
        Metric("chrf", "chrF", _chrf, share=False, package="sacrebleu"),
    )
}
