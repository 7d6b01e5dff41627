"""What every tile of the Triton kernels uses once it is compiled: registers, shared memory, spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from palkernels.bench import machine
from palkernels.bench.errors import UserError
from palkernels.bench.report import document as results
from palkernels.bench.report.table import Column, Table
from palkernels.bench.report.terminal import print_table
from palkernels.kernels import aot, tiles

__all__ = ["Selection", "report", "select"]

Variant = tuple[str, int, torch.dtype, int, tiles.Tile, str]  # what aot.compile_kernel takes


@dataclass(frozen=True)
class Selection:
    """Which tiles are compiled, and for what."""

    arch: int
    dtype: str
    kernels: tuple[str, ...]
    head_dims: tuple[int, ...]

    @property
    def variants(self) -> list[Variant]:
        return aot.shipped_variants(self.arch, (aot.DTYPES[self.dtype],), self.kernels, self.head_dims)


def select(
    arch: int | None = None,
    dtype: str | None = None,
    kernels: tuple[str, ...] | None = None,
    head_dims: tuple[int, ...] | None = None,
) -> Selection:
    """Return what the options of `palkernels doctor --tiles` select; None takes the default.

    Raises:
        UserError: there are no such tiles.
    """
    arch = _local_arch() if arch is None else arch
    dtype = "bfloat16" if dtype is None else dtype
    kernels = tiles.KERNELS if kernels is None else tuple(dict.fromkeys(kernels))
    head_dims = aot.HEAD_DIMS if head_dims is None else tuple(dict.fromkeys(head_dims))
    _check("--arch", (arch,), aot.SHARED_MEMORY)
    _check("--dtype", (dtype,), aot.DTYPES)
    _check("--kernel", kernels, tiles.KERNELS)
    _check("--head-dims", head_dims, aot.HEAD_DIMS)
    return Selection(arch, dtype, kernels, head_dims)


def report(selection: Selection, path: Path | None, console: Console) -> None:
    """Compile the selection, print the table and, if there is a path, write the rows to it as JSON.

    Raises:
        UserError: the file cannot be written, or a tile does not compile.
    """
    if path is None:
        _print(selection, _compile(selection), console)
        return
    path = path.absolute()
    with results.writable_folder(path.parent, (path.name,), "--json's folder"):
        compiled = _compile(selection)
        _print(selection, compiled, console)
        versions = {name: machine.package_version(name) for name in ("palkernels", "torch", "triton")}
        meta = {"versions": versions, **asdict(selection), "shared_memory_limit": aot.SHARED_MEMORY[selection.arch]}
        text = json.dumps({"meta": meta, "rows": [asdict(row) for row in compiled]}, indent=2) + "\n"
        results.write_all(path.parent, {path.name: text.encode()})


def _local_arch() -> int:
    if not torch.cuda.is_available():
        return 90
    return tiles.architecture(tiles.capability(torch.device("cuda")))


def _check(option: str, values: tuple[Any, ...], known: Iterable[Any]) -> None:
    *first, last = known
    for value in values:
        if value not in (*first, last):
            raise UserError(f"{option} must be {', '.join(map(str, first))} or {last}, got {value}")


def _compile(selection: Selection) -> list[aot.Compiled]:
    """Compile in a process of its own, in which nothing replaces the compiler; a progress bar goes to stderr."""
    variants = selection.variants
    command = [sys.executable, "-P", "-m", aot.__name__, str(selection.arch), "--dtypes", selection.dtype]
    command += ["--kernels", *selection.kernels, "--head-dims", *map(str, selection.head_dims)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled: list[aot.Compiled] = []
    finished: set[tuple[object, ...]] = set()  # variants; where dK and dV are split, one has two rows
    console = Console(stderr=True)
    columns = (TextColumn("compiling {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryFile() as errors,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        task = progress.add_task(_title(variants[0]), total=len(variants))
        try:
            assert process.stdout is not None
            for line in process.stdout:
                row = json.loads(line)
                compiled.append(aot.Compiled(**{**row, "tile": tiles.Tile(**row["tile"])}))
                finished.add((row["kernel"], row["head_dim"], row["features"], compiled[-1].tile))
                running = variants[min(len(finished), len(variants) - 1)]
                progress.update(task, completed=len(finished), description=_title(running))
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code != 0:
            where = "" if len(finished) == len(variants) else f": {_title(variants[len(finished)])}"
            raise UserError(f"every tile must compile for sm_{selection.arch}{where}, got {_reason(errors, code)}")
    return compiled


def _title(variant: Variant) -> str:
    kernel, _, _, head_dim, tile, features = variant
    return f"{kernel}, head dim {head_dim}, {tile.block_m} x {tile.block_n}, features: {features}"


def _reason(errors: IO[bytes], code: int) -> str:
    """Return the last thing that the compiler said."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    # Triton ends with a command on files that it has deleted.
    lines = [line for line in lines if line and not line.startswith("Repro command:")]
    return lines[-1] if lines else f"exit code {code}"


def _print(selection: Selection, compiled: list[aot.Compiled], console: Console) -> None:
    columns = [Column(heading, text=True) for heading in ("kernel", "gradients", "features")]
    columns += [Column(heading, "tile") for heading in ("head dim", "block_m x block_n", "warps", "stages")]
    columns += [Column(heading, "registers") for heading in ("limit", "used")]
    columns += [Column(heading) for heading in ("shared bytes", "stack bytes", "wgmma", "ptxas")]
    table = Table(f"sm_{selection.arch}, {selection.dtype}", columns)
    for row in compiled:
        tile = row.tile
        table.rows.append(
            [
                row.kernel,
                row.gradients,
                row.features,
                str(row.head_dim),
                f"{tile.block_m} x {tile.block_n}",
                str(tile.num_warps),
                str(tile.num_stages),
                "" if tile.max_registers is None else str(tile.max_registers),
                str(row.registers),
                f"{row.shared_bytes:,}",
                str(row.stack_bytes),
                str(row.wgmma),
                "serialised" if row.serialised else "",
            ]
        )
    print_table(table, console)
    console.print(
        f"shared bytes: of {aot.SHARED_MEMORY[selection.arch]:,}. Registers and stack: per thread; the stack holds "
        "what did not fit the registers (spills).",
        highlight=False,
    )
