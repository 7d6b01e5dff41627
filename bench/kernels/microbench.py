"""`palkernels microbench`: this library's functions beside those that users would call instead, and against the limit
that the machine sets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from palkernels.bench import machine
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.instruments import rates
from palkernels.bench.kernels import output
from palkernels.bench.kernels.cases import ALL_OPS, OPS, Case, model_cases, shape_case
from palkernels.bench.kernels.measurement import BROKEN, SEED, WRONG, Measurement, call_on, measure, our_peer
from palkernels.bench.kernels.peers import PEERS, peers_of
from palkernels.bench.options import parse_device, parse_dtype
from palkernels.bench.presets import PRESETS
from palkernels.bench.report import document as results
from palkernels.bench.report.terminal import print_table

__all__ = ["Options", "run"]

MODELS = ("llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b")  # what people run on a GPU; the first alone on a CPU
SECONDS = 0.2
MOST_SECONDS = 60


@dataclass(frozen=True)
class Options:
    """The command line of `microbench`. None takes the default, which depends on the device."""

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


def run(options: Options, console: Console) -> bool:
    """Measure, print the table and write the file, if there is one. Return False if a result was wrong, or the device
    broke.

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
        ceilings = rates.measure_rates(dtype, device)
        machine_info = output.about(device, ceilings)
        asked = {"tiles": list(options.tiles), "seconds": options.seconds or SECONDS}
        rows: list[Measurement] = []
        for done, measured in enumerate(_measure_all(cases, options), 1):
            rows += measured
            if options.json is not None:  # after every case: an interrupted run keeps what it has
                document = output.document(rows, ceilings, machine_info, asked, complete=done == len(cases))
                results.write_all(path.parent, {path.name: (json.dumps(document, indent=1) + "\n").encode()})
        print_table(output.table(rows, ceilings, machine_info), console)
        for line in (output.CAPTION, *output.notes(rows)):
            console.print(line, markup=False, highlight=False)
    return not any(row.status.startswith((WRONG, BROKEN)) for row in rows)


def _check(options: Options) -> None:
    for option, names, known in (
        ("--op", options.ops, ALL_OPS),
        ("--peers", options.peers or (), tuple(peer.key for peer in PEERS)),
        ("--model", options.models or (), tuple(PRESETS)),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"{option} must be among {', '.join(known)}, got {name!r}")
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
    models = options.models or MODELS[: 1 if on_cpu else None]
    counts = options.audio_tokens or ((512,) if on_cpu else (512, 1500, 3000))
    return [case for model in models for case in model_cases(model, options.ops, counts, dtype, device)]


def _check_peers(chosen: tuple[str, ...] | None, cases: list[Case]) -> None:
    keys = tuple(peer.key for peer in PEERS)
    available = {peer.key for case in cases for peer in peers_of(case, keys)}
    for key in chosen or ():
        if key not in available:
            known = ", ".join(peer.key for peer in PEERS if peer.key in available)
            raise UserError(f"--peers must be among {known} for these operations on this device, got {key!r}")


def _tiles(texts: tuple[str, ...], device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the tiles given as `KERNEL=M,N,WARPS,STAGES[,REGISTERS]` replace the shipped ones."""
    if not texts:
        return contextlib.nullcontext()
    if device.type != "cuda":
        raise UserError("--tile must be given with a GPU: on a CPU no Triton kernel runs")
    from palkernels.kernels import tiles

    chosen = {}
    for text in texts:
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
    """Run a case once to compile, then once between the calls that tell a profiler to start and to stop."""
    call = call_on(case, case.inputs(SEED), our_peer().prepare(case))
    call()
    machine.sync(case.device)
    on_gpu = case.device.type == "cuda"
    with torch.cuda.profiler.profile() if on_gpu else contextlib.nullcontext():
        call()
        machine.sync(case.device)
    console.print(f"{case.op} ran once, after once to warm up", markup=False)


def _measure_all(cases: list[Case], options: Options) -> Iterator[list[Measurement]]:
    """Yield the measurements of one case after the other."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(1 + len(peers_of(case, options.peers)) for case in cases))
        broken = ""
        for case in cases:
            rows = []
            checked = case if case.device.type == "cuda" else case.smaller()
            truth = [] if broken else checked.truth(checked.inputs(SEED))
            for peer in (our_peer(), *peers_of(case, options.peers)):
                progress.update(task, description=f"{case.op} {case.model} {case.audio}, {peer.name}")
                if broken:
                    rows.append(Measurement(case, peer.name, f"not run: {broken} broke the device"))
                else:
                    rows.append(measure(case, checked, truth, peer, options.seconds or SECONDS))
                    broken = peer.name if rows[-1].status.startswith(BROKEN) else ""
                progress.advance(task)
            if not broken:
                machine.release_memory(case.device)
            yield rows
