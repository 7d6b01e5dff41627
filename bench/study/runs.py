"""The runs of a study: each is `palkernels train` on a recipe, in a process of its own, which can be stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palkernels.bench.errors import UserError
from palkernels.bench.study.recipes import write_recipe
from palkernels.bench.study.settings import Settings, Where
from palkernels.model.training.checkpoints import STAGE, TRAINED

__all__ = ["Run", "finished", "lines_of", "perform", "runs_of"]

TRAIN = "from palkernels.bench.cli import main; main()"
POLL = 1.0  # seconds between two looks at the runs


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    def folder(self, where: Where) -> Path:
        return where.out / "runs" / self.name


def runs_of(settings: Settings) -> list[Run]:
    """Return the runs in their order: every method with the first seed, then with the next one."""
    return [Run(method, seed) for seed in settings.seeds for method in settings.methods]


def lines_of(run: Run, where: Where) -> list[dict[str, Any]]:
    """Return the whole lines of a run's log so far."""
    try:
        lines = (run.folder(where) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # it is being written
    return found


def finished(run: Run, settings: Settings, where: Where) -> bool:
    """Return whether a run has its last stage's model."""
    last = "2-joint" if settings.joint else "1-align"
    return (run.folder(where) / "stages" / last).exists()


def perform(
    runs: Sequence[Run], settings: Settings, where: Where, jobs: int, progress: Callable[[Run, int], None]
) -> None:
    """Do the runs that are not finished, several at a time, each on one thread.

    Args:
        runs: In their order.
        jobs: How many at a time.
        progress: Is told how many samples a run has learnt from, now and then.

    Raises:
        UserError: A run failed; its output is in ``out/logs``. The others have been stopped, and can go on.
    """
    waiting = [run for run in runs if not finished(run, settings, where)]
    for run in runs:
        if run not in waiting:
            _tidy(run, where)
            progress(run, settings.align + settings.joint)
    working: dict[Run, subprocess.Popen[bytes]] = {}
    with _stopped_at_the_end(working):
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                working[run] = _start(run, settings, where)
            time.sleep(POLL)
            for run, process in list(working.items()):
                progress(run, _samples(run, settings, where))
                code = process.poll()
                if code is None:
                    continue
                del working[run]
                if code != 0:
                    raise UserError(f"the run {run.name} must end with 0, got {code}: see {_log(run, where)}")
                _tidy(run, where)


def _start(run: Run, settings: Settings, where: Where) -> subprocess.Popen[bytes]:
    recipe = write_recipe(settings, where, run.method, run.seed)
    log = _log(run, where)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", TRAIN, "train", str(recipe), "--resume", "--no-estimate"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _tidy(run: Run, where: Where) -> None:
    """Remove a finished run's whole models, three of them: what each stage trained stays, and the log."""
    for name in ("start", "checkpoints"):
        shutil.rmtree(run.folder(where) / name, ignore_errors=True)
    for file in run.folder(where).glob("stages/*/*"):
        if file.name not in (TRAINED, STAGE):
            file.unlink()


@contextmanager
def _stopped_at_the_end(working: dict[Run, subprocess.Popen[bytes]]) -> Iterator[None]:
    """End what still works when the block is left, so that it writes a checkpoint."""
    try:
        yield
    finally:
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()


def _log(run: Run, where: Where) -> Path:
    return where.out / "logs" / f"{run.name}.txt"


def _samples(run: Run, settings: Settings, where: Where) -> int:
    """Return how many samples a run has learnt from, of both stages."""
    lines = lines_of(run, where)
    if not lines:
        return 0
    return int(lines[-1]["samples"]) + (settings.align if lines[-1]["stage"] == "joint" else 0)
