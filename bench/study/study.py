"""The study: every method learns the same tasks from the same sounds, and is asked about others."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from palkernels.bench.errors import UserError
from palkernels.bench.report.terminal import print_table
from palkernels.bench.study import curves, tables
from palkernels.bench.study.document import document
from palkernels.bench.study.joined import check_sounds, joined, load
from palkernels.bench.study.packages import encoder_folder, llm_file
from palkernels.bench.study.runs import Run, perform, runs_of
from palkernels.bench.study.settings import Settings, Where
from palkernels.bench.study.sounds.folder import Manifest, make
from palkernels.bench.study.sounds.folder import Settings as SoundSettings
from palkernels.bench.study.sounds.registry import TASKS

__all__ = ["run"]

SETTINGS, RESULT, PICTURE = "settings.json", "study.json", "study.png"


def run(settings: Settings, out: Path, jobs: int | None, console: Console, others: Sequence[Path] = ()) -> Path:
    """Make the sounds, do the runs, write study.json and study.png, and return the latter.

    Whatever ends it, a later call with the same settings goes on where it was.

    Args:
        settings: What is studied.
        out: Its folder: new, or of the same study.
        jobs: How many runs at a time; None: one for each processor that is there.
        console: Shows progress and tables.
        others: Results of runs that were done elsewhere with the same settings, which are shown beside.

    Raises:
        UserError: The settings are not usable, the folder or a result is of another study, a package is missing, or a
            run failed.
    """
    settings.check()
    elsewhere = [load(path, _as_json(settings)) for path in others]
    where = Where(out.resolve(), llm_file(), encoder_folder())
    _claim(settings, where)
    made = make(where.out / "sounds", SoundSettings(settings.train, settings.test, settings.tasks), console)
    if elsewhere:
        check_sounds(elsewhere, _about(made, settings))
    runs = runs_of(settings)
    jobs = jobs or len(os.sched_getaffinity(0))
    _perform(runs, settings, where, jobs, console)
    study = joined([document(settings, where, runs, _about(made, settings), jobs), *elsewhere])
    for table in (tables.accuracy(study), tables.cost(study)):
        print_table(table, console)
    _write(where.out / RESULT, (json.dumps(study, indent=1) + "\n").encode())
    picture = where.out / PICTURE
    _write(picture, curves.render(study))
    return picture


def _claim(settings: Settings, where: Where) -> None:
    """Say what the folder is of, or make sure that it is of the same study."""
    where.out.mkdir(parents=True, exist_ok=True)
    file = where.out / SETTINGS
    wanted = _as_json(settings)
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in wanted if name not in ("methods", "seeds") and before.get(name) != wanted[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"--out must be new or of the same study, got one with {name} {before.get(name)}, not {wanted[name]}"
            )
    elif any(where.out.iterdir()):
        raise UserError(f"--out must be a new or empty folder, or a study's, got {str(where.out)!r}")
    _write(file, (json.dumps(wanted, indent=1) + "\n").encode())


def _perform(runs: list[Run], settings: Settings, where: Where, jobs: int, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = settings.align + settings.joint
        bars = {run: progress.add_task(run.name, total=total, start=False) for run in runs}

        def show(run: Run, samples: int) -> None:
            if samples:
                progress.start_task(bars[run])
            progress.update(bars[run], completed=samples)

        perform(runs, settings, where, jobs, show)


def _as_json(settings: Settings) -> dict[str, Any]:
    """Return the settings as a file gives them back."""
    read: dict[str, Any] = json.loads(json.dumps(settings.as_dict()))
    return read


def _about(made: Manifest, settings: Settings) -> dict[str, Any]:
    return {
        "clips": made.clips,
        "seconds": round(made.seconds, 1),
        "files": made.files,
        "choices": {task: len(TASKS[task].choices) for task in settings.tasks},
    }


def _write(path: Path, content: bytes) -> None:
    written = path.with_name(f".{path.name}")
    written.write_bytes(content)
    written.replace(path)
