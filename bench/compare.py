"""`palkernels compare`: the same points of two result documents beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from palkernels.bench.report.conditions import mode_title, short
from palkernels.bench.report.document import POINT, Row, read
from palkernels.bench.report.points import ABOVE_STATIC, EAGER_RATE, MEMORY, RATE, has_eager, relative, value
from palkernels.bench.report.roles import label
from palkernels.bench.report.table import Column, Table, gib, number
from palkernels.bench.report.terminal import print_table

__all__ = ["Comparison", "differences", "match_points", "ratio", "run"]

FIGURES = {
    MEMORY: ("peak, GiB", gib),
    ABOVE_STATIC: ("above static, GiB", gib),
    RATE: ("samples/s", number),
    EAGER_RATE: ("samples/s, eager", number),
}
NOT_COMPARED = ("options", "reductions")  # conditions whose consequences are compared instead


@dataclass(frozen=True)
class Comparison:
    """Rows of the same point, A's and B's, and the rows that have no partner."""

    pairs: list[tuple[Row, Row]]
    only_first: list[Row]
    only_second: list[Row]


def run(first: Path, second: Path, console: Console) -> None:
    """Print how the conditions of two files differ, and their figures point by point.

    Raises:
        UserError: a file holds no results.
    """

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    a, b = read(first), read(second)
    say(f"A: {first}\nB: {second}\n")
    columns = [Column("", text=True), Column("A", text=True), Column("B", text=True)]
    conditions = Table("What differs in the conditions", columns, list(map(list, differences(a["meta"], b["meta"]))))
    if conditions.rows:
        print_table(conditions, console)
    else:
        say("The conditions are the same.")
    comparison = match_points(a, b)
    if comparison.pairs:
        say("\nB/A: below 1 is less memory, above 1 more throughput.")
    else:
        say("No point is in both.")
    for mode in dict.fromkeys(a["mode"] for a, _ in comparison.pairs):
        console.print()
        print_table(_table(mode, [pair for pair in comparison.pairs if pair[0]["mode"] == mode]), console)
    for name, rows in (("A", comparison.only_first), ("B", comparison.only_second)):
        for line in _unmatched(rows):
            say(f"Only in {name}: {line}")


def match_points(first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    """Pair the rows of the same points.

    A measured row names no device. It is paired with the row of every GPU of a simulation; if it was measured on one of
    these GPUs, with that one's alone.
    """
    first_rows, second_rows = _with_devices(first, second), _with_devices(second, first)
    pairs = [(a, b) for a in first_rows for b in second_rows if _is_same(a, b)]
    matched = {id(row) for pair in pairs for row in pair}
    return Comparison(
        pairs,
        [row for row in first_rows if id(row) not in matched],
        [row for row in second_rows if id(row) not in matched],
    )


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the name of each condition that differs, with both of its values."""
    a, b = _flat(first), _flat(second)
    return [(key, a.get(key, "-"), b.get(key, "-")) for key in a | b if a.get(key) != b.get(key)]


def ratio(a: Row, b: Row, key: str) -> float | None:
    """Return B's figure divided by A's; None if one is missing."""
    change = relative(value(b, key), value(a, key))
    return None if change is None else 1 + change


def _with_devices(document: dict[str, Any], other: dict[str, Any]) -> list[Row]:
    """Return a document's rows, which name the device they were measured on if the other document has rows of it."""
    name = document["meta"].get("device_name")
    if name not in [row.get("device") for row in other["rows"]]:
        return list(document["rows"])
    return [{"device": name, **row} for row in document["rows"]]


def _is_same(a: Row, b: Row) -> bool:
    devices = (a.get("device"), b.get("device"))
    return all(a[key] == b[key] for key in POINT) and (None in devices or devices[0] == devices[1])


def _flat(meta: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the conditions that there are as text, with those of nested dictionaries under "outer: inner"."""
    flat: dict[str, str] = {}
    for key, condition in meta.items():
        if key in NOT_COMPARED or condition is None:
            continue
        if isinstance(condition, dict):
            flat |= _flat(condition, f"{prefix}{key}: ")
        else:
            text = f"{condition:g}" if isinstance(condition, float) else str(condition)
            flat[f"{prefix}{key}".replace("_", " ")] = text
    return flat


def _table(mode: str, pairs: list[tuple[Row, Row]]) -> Table:
    varying = [key for key in ("text_tokens", "batch_size", "dtype") if len({a[key] for a, _ in pairs}) > 1]
    with_device = any(_device(pair) for pair in pairs)
    columns = [Column("audio tokens"), *(Column(key.replace("_", " "), text=key == "dtype") for key in varying)]
    columns += [Column("method", text=True), *[Column("device", text=True)] * with_device]
    rows = [row for pair in pairs for row in pair]
    figures = {key: about for key, about in FIGURES.items() if key != EAGER_RATE or has_eager(rows)}
    columns += [Column(heading, group) for group, _ in figures.values() for heading in ("A", "B", "B/A")]
    table = Table(mode_title(mode), columns)
    for a, b in pairs:
        cells = [f"{a['audio_tokens']:,}", *(str(a[key]) for key in varying), label(a["method"])]
        cells += [short(_device((a, b)))] * with_device
        for key, (_, write) in figures.items():
            is_first = key == MEMORY  # where a status stands instead
            cells += [row["status"] if is_first and row["status"] != "ok" else write(value(row, key)) for row in (a, b)]
            quotient = ratio(a, b, key)
            cells.append("" if quotient is None else f"{quotient:.3f}")
        table.rows.append(cells)
    return table


def _device(pair: tuple[Row, Row]) -> str | None:
    return pair[0].get("device") or pair[1].get("device")


def _unmatched(rows: list[Row]) -> list[str]:
    """Return the points without a partner, in one line for all that differ in method and audio tokens alone."""
    lines: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        on = f", {short(row['device'])}" if row.get("device") else ""
        line = f"{row['mode']}, batch {row['batch_size']}, {row['text_tokens']:,} text tokens, {row['dtype']}{on}"
        counts = lines.setdefault(line, {}).setdefault(label(row["method"]), [])
        counts.append(f"{row['audio_tokens']:,}")
    return [
        f"{line}: " + "; ".join(f"{method} with {' / '.join(counts)}" for method, counts in methods.items())
        for line, methods in lines.items()
    ]
