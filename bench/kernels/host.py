"""`palkernels microbench --host`: what a call takes of the host's time, on a GPU or on the stand-in for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from palkernels.bench import machine
from palkernels.bench.errors import UserError
from palkernels.bench.instruments import stand_in
from palkernels.bench.kernels import host_calls
from palkernels.bench.options import parse_device
from palkernels.bench.report import document as results
from palkernels.bench.report.table import Column, Table
from palkernels.bench.report.terminal import print_table

__all__ = ["MOST_SECONDS", "Options", "run"]

SECONDS = 1.0
MOST_SECONDS = 60


@dataclass(frozen=True)
class Options:
    """The command line of `microbench --host`. `seconds` are spent on each row; None takes the default."""

    device: str = "auto"
    seconds: float | None = None
    json: Path | None = None


def run(options: Options, console: Console) -> None:
    """Measure in a process of its own, print the table and write the file, if there is one.

    Raises:
        UserError: the options ask for what is not there, or there is no C compiler for the stand-in.
    """
    if options.seconds is not None and not 0 < options.seconds <= MOST_SECONDS:
        raise UserError(f"--seconds must be above 0 and at most {MOST_SECONDS}, got {options.seconds}")
    device = parse_device(options.device)
    name = host_calls.STAND_IN if device.type == "cpu" else str(device)
    seconds = options.seconds or SECONDS
    if options.json is None:
        _print(_measure(name, seconds), console)
        return
    path = options.json.absolute()
    with results.writable_folder(path.parent, (path.name,), "--json's folder"):
        document = _measure(name, seconds)
        _print(document, console)
        results.write_all(path.parent, {path.name: (json.dumps(document, indent=1) + "\n").encode()})


def _measure(name: str, seconds: float) -> dict[str, Any]:
    """Return the document of a process that measures. It is in a session of its own: Ctrl-C reaches this one alone,
    which ends it."""
    command = [sys.executable, "-P", "-m", host_calls.__name__, name, str(seconds)]
    environment = {variable: value for variable, value in os.environ.items() if variable != "TRITON_INTERPRET"}
    if name == host_calls.STAND_IN:
        environment = stand_in.child_environment()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    line: dict[str, Any] = {}
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process,
    ):
        task = progress.add_task("starting", total=1.0)
        try:
            assert process.stdout is not None
            for text in process.stdout:
                line = json.loads(text)
                if "doing" in line:
                    progress.update(task, description=line["doing"], completed=line["done"])
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if "error" in line:
        raise UserError(line["error"])
    if code != 0:
        raise RuntimeError(f"the process that measures must end with exit code 0, got {code}")
    versions = {name: machine.package_version(name) for name in ("palkernels", "torch", "triton")}
    conditions = {
        "device": line["device"],
        "cpu": machine.cpu_name(),
        "versions": {"python": sys.version.split()[0], **versions},
        "seconds": seconds,
        "implementations": host_calls.IMPLEMENTATIONS,
        "cannot_show": line["limits"],
        "datetime": datetime.now(UTC).isoformat(),
    }
    return {"rows": line["rows"], "conditions": conditions}


def _print(document: dict[str, Any], console: Console) -> None:
    rows, conditions = document["rows"], document["conditions"]
    print_table(_table(rows, conditions), console)
    for line in _notes(rows, conditions):
        console.print(line, markup=False, highlight=False)


def _table(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> Table:
    columns = [Column("operation", text=True), Column("implementation", text=True)]
    columns += [Column(heading, "host us of a call") for heading in ("median", "p10", "p90")]
    columns += [Column("times ours"), Column("launches"), Column("shape", text=True)]
    table = Table(f"The host's time of a call: {conditions['device']}, {conditions['cpu']}", columns)
    ours: dict[tuple[str, int], float] = {}
    for row in rows:
        median, case = row["host_microseconds"], (row["op"], row["shape"]["layers"])
        times_ours = f"{median / ours[case]:.2f}x" if case in ours else ""
        ours.setdefault(case, median)  # palkernels comes first
        times = [f"{row[key]:.1f}" for key in ("host_microseconds", "p10_microseconds", "p90_microseconds")]
        table.rows.append(
            [row["op"], row["implementation"], *times, times_ours, str(row["launches"] or ""), _shape(row)]
        )
    return table


def _shape(row: dict[str, Any]) -> str:
    shape = row["shape"]
    text = f"B {shape['batch']}, H {shape['heads']}/{shape['kv_heads']}, D {shape['head_dim']}, N {shape['audio']}"
    text += "" if row["op"] == "audio_kv" else f", T {shape['queries']}, S {shape['keys']}"
    return f"{text}, {shape['dtype']}"


def _notes(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> list[str]:
    """Say what the implementations are, what the figures cannot show, and which of them were disturbed."""
    notes = ["'times ours': the time over palkernels'. 'launches': of Triton's kernels, by the stand-in's count."]
    notes += [f"{name}: {meaning}." for name, meaning in conditions["implementations"].items()]
    backends = dict.fromkeys(row["backend"] for row in rows if row["backend"])
    notes.append(f"SDPA's backend: {', '.join(backends)}.")
    if conditions["cannot_show"]:
        notes += ["No GPU, but a stand-in for one. What it cannot show:"]
        notes += [f"- {limit}" for limit in conditions["cannot_show"]]
    disturbed = sum(not row["undisturbed"] for row in rows)
    if disturbed:
        notes.append(f"Other programs disturbed {disturbed} of {len(rows)} rows: longer --seconds, or a quiet machine.")
    return notes
