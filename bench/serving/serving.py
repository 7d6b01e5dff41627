"""`palkernels bench-serving`: a server for each model in turn, or one that runs, every load, and what came of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from palkernels.bench.errors import UserError
from palkernels.bench.options import dtype_name
from palkernels.bench.report.document import Row, json_text, writable_folder, write_all
from palkernels.bench.report.terminal import print_table
from palkernels.bench.serving.document import meta, meta_of_server, row
from palkernels.bench.serving.load import run_load
from palkernels.bench.serving.models import Served, dtype_of, served_models
from palkernels.bench.serving.server import Server, check_installed, running_server, serve
from palkernels.bench.serving.settings import Options, Point, check, points
from palkernels.bench.serving.tables import conditions, page, table

__all__ = ["run"]

FILES = ("serving.json", "serving.md")
WARM_UP = 4  # requests before anything is measured

NamedServer = tuple[str, AbstractContextManager[Server]]  # by its model's name


def run(options: Options, console: Console) -> None:
    """Serve, load and print; write serving.json and serving.md, once all has been measured.

    Raises:
        UserError: an option, a model or the environment is not as it must be, a server does not start, is not there or
            refuses.
    """
    check(options)
    check_installed(starts=options.url is None)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of keys and values, where there is no GPU
    with ExitStack() as stack:
        stack.enter_context(writable_folder(options.out, FILES))
        if options.url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palkernels-serving-")))
            conditions_of_run = meta(options)
            servers: list[NamedServer] = [_to_start(model, options, folder) for model in served_models(options, folder)]
        else:
            server, version = running_server(options.url)
            conditions_of_run = meta_of_server(options, version)
            servers = [(server.model, nullcontext(server))]
        document = {"meta": conditions_of_run, "rows": _rows(options, servers)}
        write_all(options.out, {FILES[0]: json_text(document), FILES[1]: page(document).encode()})
    console.print(f"{conditions(document)}\n", soft_wrap=True, highlight=False, markup=False)
    print_table(table(document), console)
    console.print(f"\nResults: {options.out / FILES[0]}", soft_wrap=True, highlight=False, markup=False)


def _to_start(model: Served, options: Options, folder: Path) -> NamedServer:
    """Return a model's name and its server, which is to be started."""
    # Of a preset's model the length, for which there may be no room otherwise.
    length = [] if model.tokens is None else ["--max-model-len", str(model.tokens)]
    dtype, log = dtype_name(dtype_of(options)), folder / f"{model.name}.log"
    return model.name, serve(model.directory, dtype, [*length, *options.serve], log, options.start_seconds)


def _rows(options: Options, servers: Sequence[NamedServer]) -> list[Row]:
    loads = list(points(options))
    rows: list[Row] = []
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, disable=not shown.is_terminal) as progress:
        for name, to_start in servers:
            task = progress.add_task(f"{name}: starts", total=len(loads) * options.requests)
            with to_start as server:
                progress.update(task, description=f"{name}: warms up")
                _loaded(server, replace(options, requests=WARM_UP), Point(1, 1), 0, name, lambda: None)
                for number, point in enumerate(loads, 1):
                    title = f"{name}: {point.questions} questions a clip, {point.concurrency} in flight"
                    progress.update(task, description=title)
                    tick = partial(progress.advance, task)
                    rows.append(_loaded(server, options, point, number, name, tick))
    return rows


def _loaded(server: Server, options: Options, point: Point, number: int, name: str, tick: Callable[[], None]) -> Row:
    """Return the row of a load."""
    (hits, queries), before = server.cached_tokens(), server.processor_seconds()
    try:
        load = run_load(server, options, point, number, tick)
    except Exception as error:
        if (end := server.ended()) is None:
            raise
        raise UserError(f"the server of {name} must live on, got {end}") from error
    after = server.processor_seconds()
    taken = None if before is None or after is None else after - before
    hits_after, queries_after = server.cached_tokens()
    share = (hits_after - hits) / (queries_after - queries) if queries_after > queries else 0.0
    return row(name, point, load, share, taken)
