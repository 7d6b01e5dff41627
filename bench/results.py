"""Results: from rows to comparisons, a table and files."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from palkernels.bench.errors import UserError, one_line

__all__ = [
    "baseline_of",
    "csv_text",
    "percent",
    "reduction",
    "speed_up",
    "summary_table",
    "writable_folder",
    "write_all",
]

Row = dict[str, Any]
BASELINE = "plits"
MODES = ("train", "infer")
GIB = 2**30


def baseline_of(row: Row, rows: list[Row]) -> Row | None:
    """The baseline's row at the same point, if both rows have figures."""
    same = ("mode", "audio_tokens", "text_tokens", "batch_size", "dtype")
    for other in rows:
        if other["method"] == BASELINE and all(other[key] == row[key] for key in same):
            return other if other is not row and row["status"] == other["status"] == "ok" else None
    return None


def speed_up(row: Row, base: Row | None) -> float | None:
    """Throughput relative to the baseline's: 2.0 is twice as fast."""
    if base is None:
        return None
    return float(row["samples_per_second"]["p50"] / base["samples_per_second"]["p50"])


def reduction(row: Row, base: Row | None, key: str) -> float | None:
    """The share of the baseline's memory that is saved: 0.6 is 60 % less. `key` names the figure."""
    return None if base is None or not base[key] else float(1 - row[key] / base[key])


def percent(share: float | None) -> str:
    """A reduction as it is written in tables and plots: -60.0 %; "" if there is none."""
    return "" if share is None else f"{round(-100 * share, 1) + 0.0:+.1f} %"  # + 0.0: no "-0.0"


def csv_text(rows: list[Row], encoder_weights: str) -> str:
    """One line per row; `samples_per_second` becomes its median and, separated by blanks, its samples."""
    out = io.StringIO()
    flat = []
    for row in rows:
        line = {key: value for key, value in row.items() if key != "samples_per_second"}
        line["encoder_weights"] = encoder_weights
        line["samples_per_second_p50"] = row["samples_per_second"]["p50"]
        line["samples_per_second_samples"] = " ".join(map(repr, row["samples_per_second"]["samples"]))
        flat.append(line)
    writer = csv.DictWriter(out, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def summary_table(rows: list[Row], labels: dict[str, str], encoder_weights: str) -> Table:
    """What was measured, with reductions and speed-ups against the baseline at the same point."""
    table = Table(
        title="Memory in GiB; reductions and speed-ups against PLITS at the same point",
        caption=f"encoder weights: {encoder_weights}",
    )
    headings = (
        "mode",
        "audio\ntokens",
        "method",
        "impl",
        "samples/s",
        "speed-up",
        "peak\nmemory",
        "change",
    )
    for heading in (*headings, "above\nstatic", "change"):
        table.add_column(heading, justify="left" if heading in ("mode", "method", "impl") else "right")
    previous = None
    for row in rows:
        point = (row["mode"], row["audio_tokens"])
        if previous not in (None, point):
            table.add_section()
        previous = point
        start = [row["mode"], str(row["audio_tokens"]), labels.get(row["method"], row["method"]), row["impl"]]
        if row["status"] != "ok":
            table.add_row(*start, row["status"])
            continue
        base = baseline_of(row, rows)
        faster = speed_up(row, base)
        table.add_row(
            *start,
            f"{row['samples_per_second']['p50']:.3g}",
            "" if faster is None else f"{faster:.2f}x",
            f"{row['peak_memory_bytes'] / GIB:.3f}",
            percent(reduction(row, base, "peak_memory_bytes")),
            f"{row['peak_above_static_bytes'] / GIB:.3f}",
            percent(reduction(row, base, "peak_above_static_bytes")),
        )
    return table


@contextmanager
def writable_folder(out: Path, names: tuple[str, ...], what: str = "--out") -> Iterator[None]:
    """Make sure, before a long run, that `names` can be written into `out`; a folder it made goes if the run
    fails. Errors call the folder `what`.

    Raises:
        UserError: the folder cannot be made or written to, or a folder stands where a file belongs.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=out):
                pass
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise UserError(f"{what} must be a folder that can be written to, got {str(out)!r}: {reason}") from error
        blocked = [name for name in names if (out / name).is_dir()]
        if blocked:
            raise UserError(f"{what} must be free for {blocked[0]}, got a folder of that name in {str(out)!r}")
        yield
    except BaseException:
        for folder in made:  # from the innermost outwards
            with suppress(OSError):  # not empty: somebody else uses it too
                folder.rmdir()
        raise


def write_all(out: Path, contents: dict[str, bytes]) -> None:
    """Write every file or, if one fails or the run is interrupted, leave all as they were.

    Raises:
        UserError: a file cannot be written.
    """
    before = {name: (out / name).read_bytes() if (out / name).exists() else None for name in contents}
    new: dict[str, Path] = {}
    placed: list[str] = []
    try:
        for name, content in contents.items():
            descriptor, path = tempfile.mkstemp(dir=out, prefix=f".{name}.")
            new[name] = Path(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(path, 0o666 & ~_umask())  # mkstemp's own mode lets nobody else read
        for name, temporary in new.items():
            placed.append(name)
            os.replace(temporary, out / name)
    except BaseException as error:
        for name in placed:
            old = before[name]
            with suppress(OSError):
                (out / name).unlink() if old is None else (out / name).write_bytes(old)
        for temporary in new.values():
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"results must be written to {str(out)!r}, got: {one_line(error)}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
