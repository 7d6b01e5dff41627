"""`palkernels microbench`: this library's functions beside what users would call instead, against the machine's limit.

The JSON file has pytest-benchmark's format, so that `pytest-benchmark compare` reads it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from palkernels.bench import machine
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.experiments.settings import parse_device, parse_dtype
from palkernels.bench.instruments import timing
from palkernels.bench.kernels.cases import OPS, Case, model_cases, shape_case
from palkernels.bench.kernels.peers import OURS, PEERS, Peer, Run, peers_of
from palkernels.bench.presets import PRESETS
from palkernels.bench.report import document as results

__all__ = ["Options", "Row", "measure", "run"]

# ||result - truth|| / ||truth|| that a correct one stays below.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
SEED = 1
WRONG, BROKEN = "wrong", "broke the device"  # how such a row's status begins
SECONDS = 0.2
MOST_SECONDS = 60


@dataclass(frozen=True)
class Options:
    """As on the command line; None takes the default, which depends on the device."""

    models: tuple[str, ...] | None = None
    ops: tuple[str, ...] = OPS
    audio_tokens: tuple[int, ...] | None = None
    shape: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    peers: tuple[str, ...] | None = None
    tiles: tuple[str, ...] = ()
    seconds: float | None = None
    once: bool = False
    json: Path | None = None


@dataclass(frozen=True)
class Row:
    """One implementation on one case. Without a time, ``status`` says why."""

    case: Case
    name: str
    status: str = "ok"
    error: float | None = None  # the largest of its results' relative errors
    samples: tuple[float, ...] = ()  # seconds
    host_seconds: float | None = None

    def percentile(self, percent: int) -> float:
        if len(self.samples) == 1:
            return self.samples[0]
        return statistics.quantiles(self.samples, n=100, method="inclusive")[percent - 1]


def run(options: Options, console: Console) -> bool:
    """Measure, print the table and write the file, if there is one. False: a result was wrong, or the device broke.

    Raises:
        UserError: the options ask for what is not there, or exclude each other.
    """
    device = parse_device(options.device)
    automatic = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = automatic if options.dtype == "auto" else parse_dtype(options.dtype)
    _check(options)
    cases = _cases(options, dtype, device)
    _check_peers(options.peers, cases)
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(_tiles(options.tiles, device))
        if options.once:
            _run_once(cases[0], console)
            return True
        if options.json is not None:
            path = options.json.absolute()
            stack.enter_context(results.writable_folder(path.parent, (path.name,), "--json's folder"))
        about = _about(device, timing.ceilings(dtype, device))
        rows = _measure_all(cases, options)
        console.print(_table(rows, about))
        for line in _notes(rows):
            console.print(line, markup=False, highlight=False)
        if options.json is not None:
            text = json.dumps(_document(rows, about, options), indent=1) + "\n"
            results.write_all(path.parent, {path.name: text.encode()})
    return not any(row.status.startswith((WRONG, BROKEN)) for row in rows)


def _check(options: Options) -> None:
    for option, given, known in (
        ("--op", options.ops, OPS),
        ("--peers", options.peers or (), tuple(peer.key for peer in PEERS)),
        ("--model", options.models or (), tuple(PRESETS)),
    ):
        for value in given:
            if value not in known:
                raise UserError(f"{option} must be among {', '.join(known)}, got {value!r}")
    if options.seconds is not None and not 0 < options.seconds <= MOST_SECONDS:
        raise UserError(f"--seconds must be above 0 and at most {MOST_SECONDS}, got {options.seconds}")
    if options.audio_tokens is not None and min(options.audio_tokens) < 1:
        raise UserError(f"--audio-tokens must be positive, got {min(options.audio_tokens)}")
    if options.once and (options.shape is None or len(options.ops) != 1):
        raise UserError("--once must be given with --shape and one --op")
    # What would be ignored.
    for option, present, excluded in (
        ("--shape", options.shape is not None, {"--model": options.models, "--audio-tokens": options.audio_tokens}),
        ("--once", options.once, {"--peers": options.peers, "--seconds": options.seconds, "--json": options.json}),
    ):
        stray = [name for name, value in excluded.items() if value is not None]
        if present and stray:
            raise UserError(f"{option} must not be given with {stray[0]}")


def _cases(options: Options, dtype: torch.dtype, device: torch.device) -> list[Case]:
    if options.shape is not None:
        return [shape_case(op, options.shape, dtype, device) for op in options.ops]
    on_cpu = device.type == "cpu"
    models = options.models or tuple(PRESETS)[: 1 if on_cpu else None]
    counts = options.audio_tokens or ((512,) if on_cpu else (512, 1500, 3000))
    return [case for model in models for case in model_cases(model, options.ops, counts, dtype, device)]


def _check_peers(chosen: tuple[str, ...] | None, cases: list[Case]) -> None:
    found = {peer.key for case in cases for peer in peers_of(case)}
    for key in chosen or ():
        if key not in found:
            known = ", ".join(peer.key for peer in PEERS if peer.key in found)
            raise UserError(f"--peers must be among {known} for these operations on this device, got {key!r}")


def _tiles(given: tuple[str, ...], device: torch.device) -> contextlib.AbstractContextManager[None]:
    """From ``KERNEL=M,N,WARPS,STAGES[,REGISTERS]``."""
    if not given:
        return contextlib.nullcontext()
    if device.type != "cuda":
        raise UserError("--tile must be given with a GPU: on a CPU no Triton kernel runs")
    from palkernels.kernels import tiles

    chosen = {}
    for text in given:
        try:
            kernel, numbers = text.split("=")
            chosen[kernel] = tiles.Tile(*(int(part) for part in numbers.split(",")))
        except (TypeError, ValueError) as error:
            wanted = "KERNEL=M,N,WARPS,STAGES[,REGISTERS]"
            raise UserError(f"--tile must be {wanted}, got {text!r}: {one_line(error)}") from error
        if kernel not in tiles.KERNELS:
            raise UserError(f"--tile must name one of {', '.join(tiles.KERNELS)}, got {kernel!r}")
    return tiles.use(**chosen)


def _run_once(case: Case, console: Console) -> None:
    """Once to compile, then once between the calls that tell a profiler to start and to stop."""
    call = _call(case, case.inputs(SEED), lambda inputs: case.ours(inputs, _ours(case)))
    call()
    machine.sync(case.device)
    on_gpu = case.device.type == "cuda"
    with torch.cuda.profiler.profile() if on_gpu else contextlib.nullcontext():
        call()
        machine.sync(case.device)
    console.print(f"{case.op} ran once, after once to warm up", markup=False)


def _ours(case: Case) -> str:
    return "triton" if case.device.type == "cuda" else "sdpa"


def _measure_all(cases: list[Case], options: Options) -> list[Row]:
    rows = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(1 + len(peers_of(case, options.peers)) for case in cases))
        broken = ""
        for case in cases:
            checked = case if case.device.type == "cuda" else case.smaller()
            truth = [] if broken else checked.truth(checked.inputs(SEED))
            ours = Peer(OURS, OURS, lambda case: lambda inputs: case.ours(inputs, _ours(case)))
            for peer in (ours, *peers_of(case, options.peers)):
                progress.update(task, description=f"{case.op} {case.model} {case.audio}, {peer.name}")
                if broken:
                    rows.append(Row(case, peer.name, f"not run: {broken} broke the device"))
                else:
                    rows.append(measure(case, checked, truth, peer, options.seconds or SECONDS))
                    broken = peer.name if rows[-1].status.startswith(BROKEN) else ""
                progress.advance(task)
            if not broken:
                machine.release_memory(case.device)
    return rows


def measure(case: Case, checked: Case, truth: list[Tensor], peer: Peer, seconds: float) -> Row:
    """One implementation on one case, if its results on the ``checked`` one are near the truth."""
    if not peer.is_installed:
        return Row(case, peer.name, f"not installed: {peer.module}")
    if case.with_gradients and not peer.has_gradients:
        return Row(case, peer.name, "computes no gradients")
    try:
        with timing.beside(case.device):
            error = _error(checked.with_its_gradients(checked.inputs(SEED), peer.prepare(checked)), truth)
            if not error <= BOUNDS[case.dtype]:  # a NaN is no less wrong
                return Row(case, peer.name, f"{WRONG}: error {error:.1g}", error)
            calls = _calls(case, peer.prepare(case))
            samples = timing.samples(calls, seconds, case.device)
            host = timing.host_seconds(calls[0], case.device)
    except Exception as problem:  # whatever another library raises on a shape that it cannot take
        if peer.key == OURS:
            raise
        if not _works(case.device):
            return Row(case, peer.name, f"{BROKEN}: {one_line(problem)[:80]}")
        return Row(case, peer.name, f"failed: {one_line(problem)[:80]}")
    return Row(case, peer.name, "ok", error, tuple(samples), host)


def _works(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access it never does again in this process."""
    try:
        machine.sync(device)
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except RuntimeError:
        return False


def _error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative error, in the Frobenius norm."""
    errors = [(x.detach().double() - y.detach()).norm() / y.detach().norm() for x, y in zip(found, truth, strict=True)]
    return float(torch.stack(errors).amax())  # NaN, if any is


def _calls(case: Case, run: Run) -> list[Callable[[], object]]:
    """One call for each of several sets of inputs."""
    first = case.inputs(SEED + 1)
    # Not case.bytes: results may land in the same memory every time, so inputs alone must exceed the cache.
    size = sum(tensor.nbytes for tensor in torch.utils._pytree.tree_leaves(first))
    count = timing.num_buffers(size, case.device)
    sets = [first, *(case.inputs(SEED + 1 + number) for number in range(1, count))]

    return [_call(case, inputs, run) for inputs in sets]


def _call(case: Case, inputs: dict[str, Any], run: Run) -> Callable[[], object]:
    """The operation on one set of inputs; what goes before a backward pass is done here."""
    if case.op != "backward":
        return lambda: case.with_its_gradients(inputs, run)
    outputs = run(inputs)
    return lambda: case.gradients(outputs, inputs)


def _times_ours(row: Row, rows: list[Row]) -> float | None:
    """This row's time over that of this library on the same case."""
    ours = next((x for x in rows if x.name == OURS and x.case == row.case), None)
    if ours is None or not ours.samples or not row.samples or row is ours:
        return None
    return row.percentile(50) / ours.percentile(50)


def _share_of_limit(row: Row, ceilings: timing.Ceilings) -> float:
    return row.case.limit(**ceilings) / row.percentile(50)


def _about(device: torch.device, ceilings: timing.Ceilings) -> dict[str, Any]:
    """The machine, asked before anything can break it."""
    on_gpu = device.type == "cuda"
    versions = {x: machine.package_version(x) for x in ("palkernels", "torch", "triton", "pytest-benchmark")}
    return {
        "node": "",
        "system": platform.system(),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": machine.cpu_name()},
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "versions": versions,
        "ceilings": ceilings,
    }


def _table(rows: list[Row], about: dict[str, Any]) -> Table:
    first, ceilings = rows[0].case, about["ceilings"]
    name = about["gpu"] or about["cpu"]["brand_raw"]
    rates = f"{ceilings['flops_per_second'] / 1e12:.3g} TFLOP/s, {ceilings['bytes_per_second'] / 1e12:.3g} TB/s"
    table = Table(
        title=f"{name}, {str(first.dtype).removeprefix('torch.')}; measured ceilings {rates}",
        caption="'slower' is the time over palkernels'. 'limit': the least time at the ceilings, over the time.",
    )
    for heading in ("op", "model", "audio\ntokens", "implementation", "median us", "p10 to p90", "rate", "limit"):
        table.add_column(heading, justify="left" if heading in ("op", "model", "implementation") else "right")
    table.add_column("slower", justify="right")
    previous = None
    for row in rows:
        case = row.case
        if previous not in (None, case):
            table.add_section()
        start = [case.op, case.model, str(case.audio)] if case != previous else ["", "", ""]
        previous = case
        if not row.samples:
            table.add_row(*start, row.name, "-")
            continue
        p10, p50, p90 = (row.percentile(x) for x in (10, 50, 90))
        rate = f"{case.bytes / p50 / 1e12:.3g} TB/s" if case.counts_bytes else f"{case.flops / p50 / 1e12:.3g} TFLOP/s"
        slower = _times_ours(row, rows)
        table.add_row(
            *start,
            row.name,
            f"{p50 * 1e6:.1f}",
            f"{p10 * 1e6:.1f} to {p90 * 1e6:.1f}",
            rate,
            f"{_share_of_limit(row, ceilings):.0%}",
            "" if slower is None else f"{slower:.2f}x",
        )
    return table


def _notes(rows: list[Row]) -> list[str]:
    """Why rows have no time; what holds for every case of an implementation is said once."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row.samples:
            case = f"{row.case.op} {row.case.model} {row.case.audio}".replace("  ", " ")
            cases.setdefault((row.name, row.status), []).append(case)
    return [
        f"{name}: {status}" + ("" if status.startswith("not installed") else f" ({', '.join(where)})")
        for (name, status), where in cases.items()
    ]


def _document(rows: list[Row], about: dict[str, Any], options: Options) -> dict[str, Any]:
    """pytest-benchmark's file; what it has no place for is in each entry's ``extra_info``."""
    from pytest_benchmark.stats import Stats

    ceilings = about["ceilings"]
    given = {"tiles": list(options.tiles), "seconds": options.seconds or SECONDS}
    benchmarks = []
    for row in rows:
        case = row.case
        params = {
            "op": case.op, "model": case.model, "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads,
            "text_tokens": case.text, "audio_tokens": case.audio, "head_dim": case.head_dim, "layers": case.layers,
            "dtype": str(case.dtype).removeprefix("torch."), "implementation": row.name,
        }  # fmt: skip
        extra: dict[str, Any] = {
            "status": row.status, "error": row.error, "flops": case.flops, "bytes": case.bytes,
            "limit_seconds": case.limit(**ceilings), "host_seconds": row.host_seconds,
        }  # fmt: skip
        stats: dict[str, Any] = {}
        if row.samples:
            measured = Stats()
            for sample in row.samples:
                measured.update(sample)
            stats = measured.as_dict() | {"iterations": 1}
            extra |= {f"p{x}_seconds": row.percentile(x) for x in (10, 50, 90)}
            extra |= {"share_of_limit": _share_of_limit(row, ceilings), "slower_than_ours": _times_ours(row, rows)}
        group = f"{case.op} {case.model or 'shape'} {case.audio}"
        benchmarks.append(
            {"group": group, "name": row.name, "fullname": f"{group} {row.name}", "params": params, "param": None,
             "extra_info": extra, "options": given, "stats": stats}
        )  # fmt: skip
    return {
        "machine_info": about,
        "commit_info": {},
        "benchmarks": benchmarks,
        "datetime": datetime.now(UTC).isoformat(),
        "version": about["versions"]["pytest-benchmark"],
    }
