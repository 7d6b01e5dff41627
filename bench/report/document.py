"""Results: from rows to comparisons, a table and files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.methods import METHODS, Method

__all__ = [
    "add_errors", "baseline_of", "csv_text", "exponents", "percent", "read", "recorded", "reduction", "serving_row",
    "simulation_table", "speed_up", "summary_table", "writable_folder", "write_all",
]  # fmt: skip

Row = dict[str, Any]
BASELINE = "plits"
GIB = 2**30
MOST_CURVATURE = 0.25  # by which the exponents between neighbouring lengths may differ
POINT = ("mode", "audio_tokens", "text_tokens", "batch_size", "dtype", "device")  # what two methods are compared at
# What every row of a document has.
COLUMNS = (
    "method", *POINT[:-1], "samples_per_second", "peak_memory_bytes", "peak_above_static_bytes", "status",
)  # fmt: skip


def baseline_of(row: Row, rows: list[Row], method: str = BASELINE) -> Row | None:
    """A method's row at the same point, if both rows have figures; only a simulated row names its device."""
    for other in rows:
        if other["method"] == method and all(other.get(key) == row.get(key) for key in POINT):
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


def recorded(options: Any) -> dict[str, Any]:
    """A command's options as results keep them, all but the folder they go to."""
    given = dataclasses.asdict(options)
    as_json: dict[str, Any] = json.loads(json.dumps(given, default=str))
    return {key: value for key, value in as_json.items() if key != "out"}


def read(path: Path) -> dict[str, Any]:
    """A document that figure1 or simulate wrote.

    Raises:
        UserError: it is none.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document["meta"], dict):
            raise ValueError("no conditions")
        for row in document["rows"]:
            if lacking := [key for key in COLUMNS if key not in row]:
                raise ValueError(f"a row without {lacking[0]}")
            figures = (row["samples_per_second"]["p50"], row["peak_memory_bytes"], row["peak_above_static_bytes"])
            numbers = [x for x in (*figures, row["audio_tokens"]) if isinstance(x, int | float)]
            if row["status"] == "ok" and len(numbers) < 4:
                raise ValueError("a row that is ok and lacks a figure")
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = "the results of palkernels figure1 or simulate"
        raise UserError(f"{str(path)!r} must hold {wanted}, got: {one_line(error)}") from error
    return document


def add_errors(rows: list[Row], measured: dict[str, Any]) -> int:
    """To each simulated row whose point was measured on its device: by how much the prediction is off, 0.05 where it is
    5 % too high. A time that is a lower bound gives a throughput that is too high. Returns how many rows have one."""
    device, found = measured["meta"].get("device_name"), 0
    for row in rows:
        for other in measured["rows"]:
            same = [key for key in (*POINT[:-1], "method") if other[key] != row[key]]
            if device == row["device"] and not same and other["status"] == "ok":
                memory = row["peak_memory_bytes"] / other["peak_memory_bytes"] - 1
                rate = row["samples_per_second"]["p50"] / other["samples_per_second"]["p50"] - 1
                row["error_against_measured"] = {"peak_memory_bytes": memory, "samples_per_second": rate}
                found += 1
    return found


def serving_row(
    method: Method, config: Any, dtype: torch.dtype, clips: int, questions: int, sizes: dict[str, int], new_tokens: int,
    first_token_seconds: float | None, other_tokens_seconds: float | None,
) -> Row:  # fmt: skip
    """`questions` about `clips`, answered in one batch, from the times up to the first token and for the others."""
    audio, text = sizes["audio_tokens"], sizes["text_tokens"]
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize
    decoded, rest = questions * (new_tokens - 1), other_tokens_seconds or 0.0  # below 0 where noise is larger
    return {
        "method": method.name,
        "clips": clips,
        "questions": questions,
        "audio_tokens": audio,
        "text_tokens": text,
        "new_tokens": new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "first_token_seconds": first_token_seconds,
        "tokens_per_second": decoded / rest if decoded and rest > 0 else None,
        "kv_bytes_per_clip": per_token * method.cached_tokens(clips, questions, audio, text + new_tokens) // clips,
        "status": "ok",
    }


def exponents(rows: list[Row]) -> list[Row]:
    """Of a sweep over lengths: for each length that varies, mode, method and quantity, the p in growth ~ length ** p.

    Growth is what a quantity has beyond its value at the shortest length, which leaves out what does not depend on it;
    lengths are counted from there too. The slope is fitted in logarithms, to the three longest. None: it does not grow,
    or by no one power (another part of the run may become the peak).
    """
    found = []
    quantities: dict[str, Callable[[Row], float]] = {
        "seconds": lambda row: row["batch_size"] / row["samples_per_second"]["p50"],
        "peak_above_static_bytes": lambda row: row["peak_above_static_bytes"],
        "attention_flops": lambda row: row["attention_flops"],
    }
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["varies"], row["mode"], row["method"], row["device"]), []).append(row)
    for (varies, mode, method, device), group in groups.items():
        for quantity, value in quantities.items():
            first, *longer = ((row[varies], value(row)) for row in sorted(group, key=lambda row: row[varies]))
            growth = [(n - first[0], y - first[1]) for n, y in longer[-3:]]
            slope = None
            if len(growth) > 1 and all(y > 0 for _, y in growth):
                logs = [(math.log(n), math.log(y)) for n, y in growth]
                steps = [(y2 - y1) / (n2 - n1) for (n1, y1), (n2, y2) in pairwise(logs)]
                if max(steps) - min(steps) <= MOST_CURVATURE:
                    slope = statistics.linear_regression(*zip(*logs, strict=True)).slope
            about = {"varies": varies, "mode": mode, "method": method, "device": device}
            found.append({**about, "quantity": quantity, "exponent": slope})
    return found


def csv_text(rows: list[Row], encoder_weights: str | None = None) -> str:
    """One line per row. What a row has by name becomes columns: the median of `samples_per_second` and, separated by
    blanks, its samples; `memory_<name>_bytes`; `error_<of what>`."""
    flat = []
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, dict)}
        if encoder_weights is not None:
            line["encoder_weights"] = encoder_weights
        line["samples_per_second_p50"] = row["samples_per_second"]["p50"]
        line["samples_per_second_samples"] = " ".join(map(repr, row["samples_per_second"]["samples"]))
        for name, size in row.get("memory_breakdown", {}).items():
            line[f"memory_{name.lower().replace('/', '').replace(' ', '_')}_bytes"] = size
        line |= {f"error_{name}": error for name, error in row.get("error_against_measured", {}).items()}
        flat.append(line)
    names = dict.fromkeys(name for line in flat for name in line)  # rows differ in what they have
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(names), lineterminator="\n")
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


def simulation_table(rows: list[Row]) -> Table:
    """What was simulated, with reductions and speed-ups against the baseline at the same point."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    table = Table(title="Simulated. Memory in GiB; reductions and speed-ups against PLITS at the same point")
    for heading in ("mode", "audio\ntokens", "text\ntokens", "method"):
        table.add_column(heading, justify="left" if heading in ("mode", "method") else "right")
    for heading in ("peak\nmemory", "change"):
        table.add_column(heading, justify="right")
    for device in devices:
        table.add_column(f"{device}\nsamples/s, speed-up", justify="right")
    previous = None
    for row in (row for row in rows if row["device"] == devices[0]):
        point = (row["mode"], row["audio_tokens"], row["text_tokens"])
        if previous not in (None, point):
            table.add_section()
        previous = point
        rates = []
        for other in rows:
            if other["method"] == row["method"] and all(other[key] == row[key] for key in POINT[:-1]):
                faster = speed_up(other, baseline_of(other, rows))
                rates.append(f"{other['samples_per_second']['p50']:.3g}" + (f"  {faster:.2f}x" if faster else " " * 7))
        table.add_row(
            row["mode"],
            str(row["audio_tokens"]),
            str(row["text_tokens"]),
            METHODS[row["method"]].label,
            f"{row['peak_memory_bytes'] / GIB:.3f}",
            percent(reduction(row, baseline_of(row, rows), "peak_memory_bytes")),
            *rates,
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
