"""`palkernels microbench --sweep`: the tiles near the shipped one, compiled ahead of time, and timed where there is a
GPU for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from palkernels import plans
from palkernels.bench import machine
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.kernels.candidates import Row, candidates, compile_all
from palkernels.bench.kernels.cases import Case, model_cases
from palkernels.bench.kernels.measurement import SEED, measure, our_peer, works
from palkernels.bench.kernels.microbench import MODELS, SECONDS
from palkernels.bench.options import dtype_name, parse_device, parse_dtype
from palkernels.bench.presets import PRESETS
from palkernels.bench.report import document as results
from palkernels.bench.report.table import Column, Table
from palkernels.bench.report.terminal import print_table
from palkernels.kernels import aot, tiles

__all__ = ["SWEEPS", "Options", "run"]

# The kernels of an operation. Where one is swept, the others have their shipped tiles.
SWEEPS = {"forward": ("forward",), "backward": ("query_gradient", "key_gradient"), "decode": ("decode",)}
AUDIO_TOKENS = (1500,)
COMPILED_FOR = 90  # without a GPU
MOST_STACK = 256  # bytes of spilt registers: a tile with more is not timed


@dataclass(frozen=True)
class Options:
    """The command line of `microbench --sweep`. None takes the default."""

    op: str
    models: tuple[str, ...] | None = None
    audio_tokens: tuple[int, ...] | None = None
    dtype: str = "auto"
    device: str = "auto"
    seconds: float | None = None
    compile_only: bool = False
    json: Path | None = None


def run(options: Options, console: Console) -> None:
    """Compile, time, print the tables and write the file, if there is one.

    Raises:
        UserError: the options ask for what is not there.
    """
    if options.op not in SWEEPS:
        raise UserError(f"--sweep must be {', '.join(SWEEPS)}, got {options.op!r}")
    for model in options.models or ():
        if model not in PRESETS:
            raise UserError(f"--model must be among {', '.join(PRESETS)}, got {model!r}")
    device = parse_device(options.device)
    if device.type != "cuda" and not options.compile_only:
        raise UserError("--sweep must be given with a GPU, or with --compile-only, got neither")
    arch = COMPILED_FOR
    if device.type == "cuda":
        arch = tiles.architecture(tiles.capability(device))
    dtype = torch.bfloat16 if options.dtype == "auto" else parse_dtype(options.dtype)
    counts = options.audio_tokens or AUDIO_TOKENS
    cases = [case for x in options.models or MODELS for case in model_cases(x, (options.op,), counts, dtype, device)]
    if options.json is None:
        _sweep(options, cases, arch, None, console)
        return
    path = options.json.absolute()
    with results.writable_folder(path.parent, (path.name,), "--json's folder"):
        _sweep(options, cases, arch, path, console)


def _sweep(options: Options, cases: list[Case], arch: int, path: Path | None, console: Console) -> None:
    versions = {name: machine.package_version(name) for name in ("palkernels", "torch", "triton")}
    on_gpu = cases[0].device.type == "cuda"
    meta = {
        "op": options.op, "arch": arch, "gpu": torch.cuda.get_device_name(cases[0].device) if on_gpu else None,
        "dtype": dtype_name(cases[0].dtype), "compile_only": options.compile_only, "versions": versions,
        "seconds": options.seconds or SECONDS, "most_stack_bytes": MOST_STACK, "complete": False,
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    rows: list[Row] = []

    def write() -> None:
        if path is not None:
            text = json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n"
            results.write_all(path.parent, {path.name: text.encode()})

    for kernel in SWEEPS[options.op]:
        compiled: dict[int, list[tuple[tiles.Tile, list[Row]]]] = {}  # by head dim
        for case in cases:
            if case.head_dim not in compiled:
                compiled[case.head_dim] = _compiled(kernel, arch, case)
            swept = []
            for row in _timed(options, kernel, case, compiled[case.head_dim]):
                swept.append(row)
                rows.append(row)
                if options.compile_only:
                    continue
                write()  # an interrupted run keeps what it has
            print_table(_table(kernel, case, swept), console)
    meta["complete"] = True
    write()


def _compiled(kernel: str, arch: int, case: Case) -> list[tuple[tiles.Tile, list[Row]]]:
    head_dim = tiles.padded_head_dim(case.head_dim)
    is_decode = kernel == "decode"  # a launch takes as few rows as hold its queries
    num_rows = case.heads // case.kv_heads if is_decode else None
    shipped = tiles.choose(kernel, arch, case.dtype, case.head_dim, False, num_rows)
    chosen = candidates(shipped, fixed=("block_m",) if is_decode else ())
    processes = min(os.cpu_count() or 1, -(-len(chosen) // 3))
    return list(compile_all(kernel, arch, dtype_name(case.dtype), head_dim, chosen, processes))


def _timed(options: Options, kernel: str, case: Case, compiled: list[tuple[tiles.Tile, list[Row]]]) -> Iterator[Row]:
    """Yield a row for each tile: what it uses, and its time where it may have one. The first is the shipped one."""
    truth = None if options.compile_only else case.truth(case.inputs(SEED))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{kernel} {case.model} {case.audio}", total=len(compiled))
        for tile, launches in compiled:
            row: Row = {"model": case.model, "op": case.op, "audio_tokens": case.audio, "kernel": kernel}
            row |= {"tile": asdict(tile), "launches": launches, "status": _against(launches), "microseconds": None}
            if truth is not None and not row["status"]:
                row |= _measured(kernel, tile, case, truth, options.seconds or SECONDS)
            yield row
            progress.advance(task)
    if truth is not None:
        machine.release_memory(case.device)


def _measured(kernel: str, tile: tiles.Tile, case: Case, truth: list[Tensor], seconds: float) -> Row:
    """Return the time of a tile, or why it has none."""
    plans.forget_all()
    try:
        with tiles.use(**{kernel: tile}):
            measured = measure(case, case, truth, our_peer(), seconds)
    except Exception as problem:  # Triton's, on a tile that this GPU cannot launch
        if not works(case.device):
            raise
        return {"status": f"failed: {one_line(problem)[:80]}"}
    return {"status": measured.status, "microseconds": 1e6 * measured.percentile(50) if measured.samples else None}


def _size(tile: Row) -> str:
    return f"{tile['block_m']} x {tile['block_n']}{', split' if tile['splits_keys'] else ''}"


def _against(launches: list[Row]) -> str:
    """Return why a tile is not timed, or ""."""
    for launch in launches:
        if "failed" in launch:
            return f"does not compile: {launch['failed']}"
        limit = aot.SHARED_MEMORY[launch["capability"]]
        if launch["shared_bytes"] > limit:
            return f"shared memory must be at most {limit:,}, got {launch['shared_bytes']:,}"
        if launch["stack_bytes"] > MOST_STACK:
            return f"spills {launch['stack_bytes']:,} bytes"
    return ""


def _table(kernel: str, case: Case, rows: list[Row]) -> Table:
    """Return the tiles, the fastest first; without times in their order."""
    columns = [Column(heading, "tile") for heading in ("block_m x block_n", "warps", "stages", "limit")]
    columns += [Column(heading) for heading in ("registers", "stack", "shared bytes", "us")]
    columns += [Column("", text=True)]
    table = Table(f"{kernel}, {case.model}, {case.audio} audio tokens, {dtype_name(case.dtype)}", columns)
    shipped = rows[0]["tile"]
    for row in sorted(rows, key=lambda row: row["microseconds"] or float("inf")):
        tile, used = row["tile"], [x for x in row["launches"] if "failed" not in x]
        sizes = [_size(tile), tile["num_warps"], tile["num_stages"], tile["max_registers"]]
        most = [str(max((x[key] for x in used), default="")) for key in ("registers", "stack_bytes", "shared_bytes")]
        time = "" if row["microseconds"] is None else f"{row['microseconds']:.1f}"
        remarks = ["shipped"] if tile == shipped else []
        remarks += ["serialised"] if any(x["serialised"] for x in used) else []
        remarks += [row["status"]] if row["status"] not in ("", "ok") else []
        table.rows.append([*("" if x is None else str(x) for x in sizes), *most, time, ", ".join(remarks)])
    return table
