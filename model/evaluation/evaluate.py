"""``evaluate``: what a model answers to samples, compared with what it should have said."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from palkernels.model.data import Dropped, Sample
from palkernels.model.evaluation.answering import Asker
from palkernels.model.evaluation.metrics import METRICS, chosen_metrics, packages_of
from palkernels.model.evaluation.questions import batches, question_of, why_not
from palkernels.model.evaluation.scores import Answer, Scores, TaskScores

__all__ = ["evaluate"]


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    metrics: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    states: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Ask a model every sample's question, and compare its answers with those of the samples.

    Of a conversation with several turns the last is asked, after the earlier ones as they are. Answers are generated
    greedily; those of a sample with choices are also compared by their probabilities, see
    :mod:`palkernels.model.evaluation.choosing`. The size of the batches changes no answer, rounding aside. A sample
    that cannot be asked (no answer to compare with, a clip that is missing or refused) is in ``Scores.dropped`` with
    what is wrong with it, and in no figure.

    Args:
        model: a :class:`PalForConditionalGeneration`, on any device. It is put into ``eval`` mode, and back.
        processor: its processor.
        samples: each ends with the answer to compare with. Its ``task`` is what figures are given for.
        batch_size: how many samples are asked at once.
        max_new_tokens: the longest answer. ``Scores.answers`` says which were cut there.
        metrics: names for all tasks, or by task, of "choice", "exact", "wer", "cer", "bleu" and "chrf"; others by the
            rule of :func:`palkernels.model.evaluation.metrics.chosen_metrics`. The last four need the packages of
            ``palkernels[evaluate]``.
        states: the cache of frozen encoders' states, which are then not computed, as
            :class:`palkernels.model.data.Collator` takes it.
        progress: is told after each batch how many samples have been dealt with.

    Raises:
        ValueError: there is no sample, none that can be asked, an unknown metric, a count below 1, or ``states`` are of
            other encoders.
        ModuleNotFoundError: what a metric needs is not installed.
    """
    for name, count in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be at least 1, got {count!r}")
    if not len(samples):
        raise ValueError("samples must hold at least one, got none")
    reasons = [why_not(sample) for sample in samples]
    questions = [question_of(i, samples[i]) for i, reason in enumerate(reasons) if reason is None]
    dropped = {i: Dropped(samples[i].source, *reason) for i, reason in enumerate(reasons) if reason is not None}
    names = chosen_metrics(questions, metrics) if questions else {}
    if states is not None:
        states.check(processor)
        processor = copy.copy(processor)
        processor.audio_features = states.of_clips
    with_choices = any("choice" in of_task for of_task in names.values())
    asker = Asker(model, processor, max_new_tokens, with_choices, with_states=states is not None)
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches(questions, batch_size):
            said, refused = asker.ask(batch)
            answers |= said
            dropped |= refused
            if progress is not None:
                progress(len(answers) + len(dropped))
    finally:
        model.train(was_training)
    if not answers:
        first = dropped[min(dropped)]
        raise ValueError(f"samples must hold one that can be asked, got none of {len(samples)}: {first.detail}")
    in_order = [answers[number] for number in sorted(answers)]
    return Scores(
        tasks=_by_task(in_order, names),
        overall=_overall(in_order, names),
        answers=tuple(in_order),
        dropped=tuple(dropped[number] for number in sorted(dropped)),
        settings={
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "metrics": {task: list(of_task) for task, of_task in names.items()},
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        versions=_versions([name for of_task in names.values() for name in of_task]),
    )


def _by_task(answers: Sequence[Answer], names: Mapping[str, Sequence[str]]) -> tuple[TaskScores, ...]:
    found = []
    for task, of_task in names.items():
        of_answers = [answer for answer in answers if answer.task == task]
        if of_answers:  # no clip of a task may have been readable
            found.append(_scored(task, of_answers, dict.fromkeys(of_task, (task,))))
    return tuple(found)


def _overall(answers: Sequence[Answer], names: Mapping[str, Sequence[str]]) -> TaskScores:
    tasks_of: dict[str, tuple[str, ...]] = {}
    for task, of_task in names.items():
        for name in of_task:
            tasks_of[name] = (*tasks_of.get(name, ()), task)
    return _scored(None, answers, tasks_of)


def _scored(task: str | None, answers: Sequence[Answer], tasks_of: Mapping[str, Sequence[str]]) -> TaskScores:
    """Return the figures of metrics, each of the answers to its tasks."""
    scores = []
    for name, metric in METRICS.items():
        of_metric = [answer for answer in answers if answer.task in tasks_of.get(name, ())]
        if name == "choice":
            of_metric = [answer for answer in of_metric if answer.chosen is not None]
        if of_metric:
            scores.append(metric.score(of_metric))
    return TaskScores(task, len(answers), tuple(scores))


def _versions(metrics: Sequence[str]) -> dict[str, str]:
    return {name: version(name) for name in ("palkernels", "torch", "transformers", *packages_of(metrics))}
