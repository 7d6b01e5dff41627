"""Result documents: what figure1 and simulate write, how it is read again, and how files are written safely."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from palkernels.bench.errors import UserError, one_line

__all__ = [
    "ERRORS", "GIB", "PARTS", "POINT", "Row", "csv_text", "json_text", "read", "recorded", "writable_folder",
    "write_all",
]  # fmt: skip

Row = dict[str, Any]  # one method at one point
GIB = 2**30
ERRORS = "error_against_measured"  # of a simulated row that was measured, too: its relative errors by figure
# The parts of memory_breakdown, in the order of tables and pictures.
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "K/V cache", "temporaries")
POINT = ("method", "mode", "audio_tokens", "text_tokens", "batch_size", "dtype")  # by which documents are matched
# What a row must have, and the type of each; figures are None where the method did not run.
COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("method", "mode", "dtype", "status"), str),
    **dict.fromkeys(("audio_tokens", "text_tokens", "batch_size"), int),
    "samples_per_second": dict,
    **dict.fromkeys(("peak_memory_bytes", "peak_above_static_bytes"), int | float | None),
}


def recorded(options: Any) -> dict[str, Any]:
    """Return a command's options as results keep them: in JSON's types, without the output folder."""
    in_json: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return {key: value for key, value in in_json.items() if key != "out"}


def read(path: Path) -> dict[str, Any]:
    """Return the document that figure1 or simulate wrote to a file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document["meta"], dict):
            raise ValueError("no conditions")
        for row in document["rows"]:
            _check_row(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = "the results of palkernels figure1 or simulate"
        raise UserError(f"{str(path)!r} must hold {wanted}, got: {one_line(error)}") from error
    return document


def _check_row(row: Row) -> None:
    if missing := [key for key in COLUMNS if key not in row]:
        raise ValueError(f"a row without {missing[0]}")
    optional = {"device": str | None, "eager_samples_per_second": int | float | None}
    for key, kind in {**COLUMNS, **optional}.items():
        if not isinstance(row.get(key), kind):
            raise ValueError(f"a row whose {key} is {row[key]!r}")
    figures = (row["samples_per_second"]["p50"], row["peak_memory_bytes"], row["peak_above_static_bytes"])
    figures += tuple(row["samples_per_second"]["samples"])
    if row["status"] == "ok" and not all(isinstance(figure, int | float) for figure in figures):
        raise ValueError("a row that is ok and lacks a figure")


def json_text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def csv_text(rows: list[Row], encoder_weights: str | None = None) -> str:
    """Return a CSV file with one line a row.

    A row's dictionaries become columns: `samples_per_second_p50` (the median) and `samples_per_second_samples`
    (separated by blanks), `memory_<part>_bytes`, and `error_<figure>`.
    """
    lines = []
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, dict)}
        if encoder_weights is not None:
            line["encoder_weights"] = encoder_weights
        line["samples_per_second_p50"] = row["samples_per_second"]["p50"]
        line["samples_per_second_samples"] = " ".join(map(repr, row["samples_per_second"]["samples"]))
        for part, size in row.get("memory_breakdown", {}).items():
            line[f"memory_{part.lower().replace('/', '').replace(' ', '_')}_bytes"] = size
        line |= {f"error_{figure}": error for figure, error in row.get(ERRORS, {}).items()}
        lines.append(line)
    columns = dict.fromkeys(column for line in lines for column in line)  # not every row has every column
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


@contextmanager
def writable_folder(out: Path, names: tuple[str, ...], what: str = "--out") -> Iterator[None]:
    """Make sure, before a long run, that the files `names` can be written into `out`.

    A folder that this made is removed if the run fails. Errors call the folder `what`.

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
    """Write every file; if one fails, or the run is interrupted, leave all as they were.

    Raises:
        UserError: a file cannot be written.
    """
    before = {name: (out / name).read_bytes() if (out / name).exists() else None for name in contents}
    new: dict[str, Path] = {}
    replaced: list[str] = []
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
            replaced.append(name)
            os.replace(temporary, out / name)
    except BaseException as error:
        for name in replaced:
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
