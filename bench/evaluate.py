"""`palkernels evaluate`: what a saved model answers to samples from files, as a table and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.machine import is_out_of_memory
from palkernels.bench.options import parse_device
from palkernels.bench.report import document as results
from palkernels.bench.report.table import Column, Table
from palkernels.bench.report.terminal import print_table
from palkernels.bench.saved import load_saved
from palkernels.bench.untrained import untrained_warning
from palkernels.model import Scores, evaluate
from palkernels.model.data import Dropped, Sample, Source, read
from palkernels.model.evaluation.metrics import METRICS
from palkernels.model.evaluation.scores import Score, TaskScores
from palkernels.model.training.recipe import RecipeError
from palkernels.model.training.source_recipe import sources_of_words

__all__ = ["Options", "run", "table"]

LISTED = 5  # dropped samples that are shown


@dataclass(frozen=True)
class Options:
    """What is asked of which model, and where the outcome goes."""

    model: Path
    data: tuple[str, ...]  # each a path, or a mapping of what a Source has
    metrics: tuple[str, ...] = ()  # each "wer", "TASK=wer" or "TASK=wer,cer"
    json: Path | None = None
    answers: Path | None = None
    device: str = "auto"
    batch: int = 8
    max_new_tokens: int = 64
    limit: int | None = None


def run(options: Options, console: Console) -> Scores:
    """Evaluate a model, print its figures, write the files that are asked for, and return what was found.

    Raises:
        UserError: model, data, a metric or a file is not as it must be, or memory does not suffice.
    """
    device = parse_device(options.device)
    sources = _sources(options)
    with _writable(options):
        model, processor = load_saved(options.model, device)
        samples, dropped = _samples(sources, options.limit, processor.longest_clip)
        found = _evaluated(model, processor, samples, options)
        found = replace(found, dropped=(*dropped, *found.dropped), settings=_settings(options, found))
        if (warning := untrained_warning(options.model)) is not None:
            console.print(warning, soft_wrap=True, highlight=False)
        print_table(table(found), console)
        for note in _notes(found):
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        _write(found, options)
    return found


def table(scores: Scores) -> Table:
    """Return a row of figures for each task, and one for all of them if there are several."""
    rows = [*scores.tasks, *([scores.overall] if len(scores.tasks) > 1 else [])]
    of_rows = [{score.metric: score for score in row.scores} for row in rows]
    names = [name for name in METRICS if any(name in figures for figures in of_rows)]
    columns = [Column("task", text=True), Column("samples")]
    counted = {name: any(_is_of_fewer(of_task, name) for of_task in scores.tasks) for name in names}
    for name in names:
        unit = "%" if METRICS[name].share else "of 100"
        headings = [unit, "95 % interval", *["samples"] * counted[name]]
        columns += [Column(heading, METRICS[name].title) for heading in headings]
    shown = Table("", columns)
    for row, figures in zip(rows, of_rows, strict=True):
        cells = ["all" if row.task is None else row.task or "(none)", f"{row.count:,}"]
        for name in names:
            cells += _cells(figures.get(name), METRICS[name].share)
            cells += [f"{figures[name].count:,}" if name in figures else ""] * counted[name]
        shown.rows.append(cells)
    return shown


def _is_of_fewer(of_task: TaskScores, metric: str) -> bool:
    """Return whether a metric leaves samples of a task out, as "choice" does those without choices."""
    return any(score.metric == metric and score.count < of_task.count for score in of_task.scores)


def _cells(score: Score | None, share: bool) -> list[str]:
    if score is None:
        return ["", ""]
    scale = 100 if share else 1
    interval = "" if score.low is None or score.high is None else f"{scale * score.low:.1f} to {scale * score.high:.1f}"
    return [f"{scale * score.value:.1f}", interval]


def _notes(found: Scores) -> Iterator[str]:
    if found.incomplete:
        limit = found.settings["max_new_tokens"]
        yield f"{found.incomplete:,} of {len(found.answers):,} answers did not end within {limit} tokens."
    if not found.dropped:
        return
    reasons: dict[str, list[Any]] = {}
    for dropped in found.dropped:
        reasons.setdefault(dropped.reason, []).append(dropped)
    counts = ", ".join(f"{len(alike):,} {reason}" for reason, alike in reasons.items())
    yield f"{len(found.dropped):,} samples are in no figure: {counts}."
    for dropped in found.dropped[:LISTED]:
        detail = dropped.detail.removeprefix(f"{dropped.source}: ")
        yield f"  {dropped.source}: {detail}"
    if len(found.dropped) > LISTED:
        yield f"  ... and {len(found.dropped) - LISTED:,} more, which --json lists"


def _sources(options: Options) -> list[Source]:
    """Return what --data names, in the order in which it is given."""
    try:
        return sources_of_words(options.data, Path())
    except RecipeError as error:
        raise UserError(f"--data must be files of samples, got {'; '.join(error.faults)}") from error


def _samples(sources: Sequence[Source], limit: int | None, max_seconds: float) -> tuple[list[Sample], list[Dropped]]:
    """Return the samples of all files, at most `limit` of each, evenly from its beginning to its end."""
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    for source in sources:
        try:
            of_file = read(source, max_seconds=max_seconds, progress=True)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--data must be a file of samples, got {source.path!r}: {one_line(error)}") from error
        count = len(of_file) if limit is None else min(limit, len(of_file))
        samples += [of_file[i * len(of_file) // count] for i in range(count)]
        dropped += of_file.dropped
    return samples, dropped


def _evaluated(model: Any, processor: Any, samples: Sequence[Sample], options: Options) -> Scores:
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=len(samples))
        try:
            return evaluate(
                model,
                processor,
                samples,
                batch_size=options.batch,
                max_new_tokens=options.max_new_tokens,
                metrics=_metrics(options.metrics, samples),
                progress=lambda done: progress.update(task, completed=done),
            )
        except (ModuleNotFoundError, ValueError) as error:
            raise UserError(one_line(error)) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                got = f"got {options.batch}: {one_line(error)}"
                raise UserError(f"--batch must be small enough for the device's memory, {got}") from error
            raise


def _metrics(given: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[str]] | None:
    """Return the metrics of each task for which --metric names some."""
    by_task: dict[str, list[str]] = {}
    for_all: list[str] = []
    for text in given:
        task, is_of_one, names = text.rpartition("=")
        (by_task.setdefault(task, []) if is_of_one else for_all).extend(names.split(","))
    if for_all:
        by_task = dict.fromkeys((sample.task for sample in samples), for_all) | by_task
    return by_task or None


def _settings(options: Options, found: Scores) -> dict[str, Any]:
    chosen = {"model": str(options.model), "data": list(options.data), "limit": options.limit}
    return {**chosen, **found.settings}


def _files(options: Options) -> dict[str, Path]:
    """Return the files to write by the option that names them."""
    given = {"--json": options.json, "--answers": options.answers}
    return {option: path.absolute() for option, path in given.items() if path is not None}


@contextmanager
def _writable(options: Options) -> Iterator[None]:
    """Make sure, before a long run, that the files can be written."""
    files = _files(options)
    if len(set(files.values())) < len(files):
        raise UserError(f"--answers must be another file than --json, got {str(options.json)!r} for both")
    with ExitStack() as stack:
        for option, path in files.items():
            stack.enter_context(results.writable_folder(path.parent, (path.name,), f"{option}'s folder"))
        yield


def _write(found: Scores, options: Options) -> None:
    """Write each file whole or not at all."""
    contents = {
        "--json": results.json_text(found.document()),
        "--answers": "".join(json.dumps(asdict(answer)) + "\n" for answer in found.answers).encode(),
    }
    for option, path in _files(options).items():
        results.write_all(path.parent, {path.name: contents[option]})
