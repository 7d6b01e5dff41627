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

from palkernels.bench import machine, results, timing
from palkernels.bench.cases import OPS, Case, model_cases, shape_case
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.peers import OURS, PEERS, Peer, peers_of
from palkernels.bench.presets import PRESETS

__all__ = ["Options", "Row", "measure", "run"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# ||result - truth|| / ||truth|| that a correct one stays below.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
SEED = 1


@dataclass(frozen=True)
class Options:
    """As on the command line; None takes the default, which depends on the device."""

    models: tuple[str, ...] | None = None
    ops: tuple[str, ...] = OPS
    audio_tokens: tuple[int, ...] = (512, 1500, 3000)
    shape: str | None = None
    dtype: str | None = None
    device: str = "auto"
    peers: tuple[str, ...] | None = None
    tiles: tuple[str, ...] = ()
    seconds: float = 0.2
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
    """Measure, print the table and write the file, if there is one. False where a result was wrong.

    Raises:
        UserError: the options ask for what is not there.
    """
    device, dtype = _device(options.device), _dtype(options)
    cases = _cases(options, dtype, device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_tiles(options.tiles, device))
        if options.once:
            _run_once(cases[0], console)
            return True
        if options.json is not None:
            path = options.json.absolute()
            stack.enter_context(results.writable_folder(path.parent, (path.name,), "--json's folder"))
        ceilings = timing.ceilings(dtype, device)
        rows = _measure_all(cases, options)
        console.print(_table(rows, ceilings))
        for line in _notes(rows):
            console.print(line, markup=False, highlight=False)
        if options.json is not None:
            text = json.dumps(_document(rows, ceilings), indent=1) + "\n"
            results.write_all(path.parent, {path.name: text.encode()})
    return not any(row.status.startswith("wrong") for row in rows)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda must have a CUDA GPU, got none")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _dtype(options: Options) -> torch.dtype:
    name = options.dtype or ("float32" if _device(options.device).type == "cpu" else "bfloat16")
    if name not in DTYPES:
        raise UserError(f"--dtype must be {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _cases(options: Options, dtype: torch.dtype, device: torch.device) -> list[Case]:
    for option, given, known in (
        ("--op", options.ops, OPS),
        ("--peers", options.peers or (), tuple(peer.key for peer in PEERS)),
        ("--model", options.models or (), tuple(PRESETS)),
    ):
        for value in given:
            if value not in known:
                raise UserError(f"{option} must be among {', '.join(known)}, got {value!r}")
    if options.seconds <= 0:
        raise UserError(f"--seconds must be positive, got {options.seconds}")
    if options.once and (options.shape is None or len(options.ops) != 1):
        raise UserError("--once must be given with --shape and one --op")
    if options.shape is not None:
        if options.models:
            raise UserError("--shape must not be given with --model")
        return [shape_case(op, options.shape, dtype, device) for op in options.ops]
    if min(options.audio_tokens) < 1:
        raise UserError(f"--audio-tokens must be positive, got {min(options.audio_tokens)}")
    models = options.models or (tuple(PRESETS) if device.type == "cuda" else tuple(PRESETS)[:1])
    return [case for model in models for case in model_cases(model, options.ops, options.audio_tokens, dtype, device)]


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
    inputs = case.inputs(SEED)
    for _ in range(2):  # the first one compiles
        case.with_its_gradients(inputs, lambda given: case.ours(given, _ours(case)))
    timing.host_seconds(lambda: None, case.device)
    console.print(f"{case.op} ran twice, the first time to warm up", markup=False)


def _ours(case: Case) -> str:
    return "triton" if case.device.type == "cuda" else "sdpa"


def _measure_all(cases: list[Case], options: Options) -> list[Row]:
    rows = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(1 + len(peers_of(case, options.peers)) for case in cases))
        for case in cases:
            checked = case if case.device.type == "cuda" else case.smaller()
            truth = checked.truth(checked.inputs(SEED))
            ours = Peer(OURS, OURS, lambda case: lambda inputs: case.ours(inputs, _ours(case)))
            for peer in (ours, *peers_of(case, options.peers)):
                progress.update(task, description=f"{case.op} {case.model} {case.audio}, {peer.name}")
                rows.append(measure(case, checked, truth, peer, options.seconds))
                progress.advance(task)
            machine.release_memory(case.device)
    return rows


def measure(case: Case, checked: Case, truth: list[Tensor], peer: Peer, seconds: float) -> Row:
    """One implementation on one case, if its results on the ``checked`` one are near the truth."""
    if not peer.is_installed:
        return Row(case, peer.name, f"not installed: {peer.module}")
    try:
        with timing.beside(case.device):
            error = _error(checked.with_its_gradients(checked.inputs(SEED), peer.prepare(checked)), truth)
            if not error <= BOUNDS[case.dtype]:  # a NaN is no less wrong
                return Row(case, peer.name, f"wrong: error {error:.1g}", error)
            calls = _calls(case, peer.prepare(case))
            samples = timing.samples(calls, seconds, case.device)
            host = timing.host_seconds(calls[0], case.device)
    except Exception as problem:  # whatever another library raises on a shape that it cannot take
        if peer.key == OURS:
            raise
        if isinstance(problem, torch.AcceleratorError):  # then nothing more runs on the device in this process
            where = f"{case.op} {case.model} with {case.audio} audio tokens"
            raise UserError(
                f"{peer.name} must not break the device, it did in {where}: {one_line(problem)}"
            ) from problem
        return Row(case, peer.name, f"failed: {one_line(problem)[:80]}")
    return Row(case, peer.name, "ok", error, tuple(samples), host)


def _error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative error, in the Frobenius norm."""
    errors = [(x.detach().double() - y.detach()).norm() / y.detach().norm() for x, y in zip(found, truth, strict=True)]
    return float(torch.stack(errors).amax())  # NaN, if any is


def _calls(case: Case, run: Callable[[dict[str, Any]], list[Tensor]]) -> list[Callable[[], object]]:
    """One call for each of several sets of inputs."""
    first = case.inputs(SEED + 1)
    # Not case.bytes: results may land in the same memory every time, so inputs alone must exceed the cache.
    size = sum(tensor.nbytes for tensor in torch.utils._pytree.tree_leaves(first))
    count = timing.num_buffers(size, case.device)
    sets = [first, *(case.inputs(SEED + 1 + number) for number in range(1, count))]

    def call(inputs: dict[str, Any]) -> Callable[[], object]:
        if case.op != "backward":
            return lambda: case.with_its_gradients(inputs, run)
        outputs = run(inputs)
        return lambda: case.gradients(outputs, inputs)

    return [call(inputs) for inputs in sets]


def _key(row: Row) -> tuple[Any, ...]:
    case = row.case
    return case.op, case.model, case.batch, case.heads, case.kv_heads, case.text, case.audio, case.head_dim


def _times_ours(row: Row, rows: list[Row]) -> float | None:
    """This row's time over that of this library on the same case."""
    ours = next((x for x in rows if x.name == OURS and _key(x) == _key(row)), None)
    if ours is None or not ours.samples or not row.samples or row is ours:
        return None
    return row.percentile(50) / ours.percentile(50)


def _share_of_limit(row: Row, ceilings: timing.Ceilings) -> float:
    return row.case.limit(**ceilings) / row.percentile(50)


def _table(rows: list[Row], ceilings: timing.Ceilings) -> Table:
    first = rows[0].case
    name = machine.cpu_name() if first.device.type == "cpu" else torch.cuda.get_device_name(first.device)
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
        if previous not in (None, _key(row)):
            table.add_section()
        start = [case.op, case.model, str(case.audio)] if _key(row) != previous else ["", "", ""]
        previous = _key(row)
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


def _document(rows: list[Row], ceilings: timing.Ceilings) -> dict[str, Any]:
    """pytest-benchmark's file; what it has no place for is in each entry's ``extra_info``."""
    from pytest_benchmark.stats import Stats

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
             "extra_info": extra, "options": {}, "stats": stats}
        )  # fmt: skip
    on_gpu = rows[0].case.device.type == "cuda"
    versions = {x: machine.package_version(x) for x in ("palkernels", "torch", "triton", "pytest-benchmark")}
    return {
        "machine_info": {
            "node": "",
            "system": platform.system(),
            "python_version": platform.python_version(),
            "cpu": {"brand_raw": machine.cpu_name()},
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "cuda": torch.version.cuda if on_gpu else None,
            "versions": versions,
            "ceilings": ceilings,
        },
        "commit_info": {},
        "benchmarks": benchmarks,
        "datetime": datetime.now(UTC).isoformat(),
        "version": versions["pytest-benchmark"],
    }
