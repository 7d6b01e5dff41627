"""`palkernels compare`: the same points of two result documents beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from palkernels.bench.report.conditions import label, rates, short
from palkernels.bench.report.document import Row, read
from palkernels.bench.report.points import ABOVE_STATIC, MEMORY, RATE, value
from palkernels.bench.report.tables import gib, number

__all__ = ["Comparison", "compare", "differences", "ratio", "run"]

MATCHED = ("method", "mode", "audio_tokens", "text_tokens", "batch_size", "dtype")
FIGURES = {MEMORY: ("peak GiB", gib), ABOVE_STATIC: ("above static GiB", gib), RATE: ("samples/s", number)}
UNLIKE = ("options", "reductions")  # of the conditions: what they lead to is compared instead


@dataclass(frozen=True)
class Comparison:
    """Rows of the same point, A's and B's, and the rows that have no partner."""

    pairs: list[tuple[Row, Row]]
    only_first: list[Row]
    only_second: list[Row]


def run(first: Path, second: Path, console: Console) -> None:
    """Print what differs, and the tables.

    Raises:
        UserError: a file holds no results.
    """
    a, b = read(first), read(second)
    console.print(f"A: {first}\nB: {second}", soft_wrap=True, highlight=False, markup=False)
    conditions = Table(title="What differs in the conditions")
    for heading in ("", "A", "B"):
        conditions.add_column(heading, overflow="fold")
    for difference in differences(a["meta"], b["meta"]):
        conditions.add_row(*difference)
    if conditions.rows:
        console.print(conditions, markup=False)
    else:
        console.print("The conditions are the same.")
    found = compare(a, b)
    if found.pairs:
        console.print(_table(found.pairs))
    else:
        console.print("No point is in both.")
    for name, rows in (("A", found.only_first), ("B", found.only_second)):
        for line in _alone(rows):
            console.print(f"Only in {name}: {line}", soft_wrap=True, highlight=False, markup=False)


def compare(first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    """Match points. A measured row, which names no device, is every GPU's row of a simulation unless it was measured on
    one of those."""
    ours, theirs = _with_devices(first, second), _with_devices(second, first)
    pairs = [(a, b) for a in ours for b in theirs if _is_same(a, b)]
    matched = {id(row) for pair in pairs for row in pair}
    return Comparison(
        pairs, [row for row in ours if id(row) not in matched], [row for row in theirs if id(row) not in matched]
    )


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The conditions that are not the same, and each one's."""
    a, b = (_flat(meta | {"gpus": "; ".join(rates(meta))} if "gpus" in meta else meta) for meta in (first, second))
    return [(key, a.get(key, "-"), b.get(key, "-")) for key in a | b if a.get(key) != b.get(key)]


def ratio(a: Row, b: Row, key: str) -> float | None:
    """B's figure by A's; None if there are not both."""
    mine, other = value(a, key), value(b, key)
    return None if not mine or other is None else other / mine


def _with_devices(document: dict[str, Any], other: dict[str, Any]) -> list[Row]:
    name = document["meta"].get("device_name")
    if name not in {row.get("device") for row in other["rows"]}:
        return list(document["rows"])
    return [{"device": name, **row} for row in document["rows"]]


def _is_same(a: Row, b: Row) -> bool:
    devices = (a.get("device"), b.get("device"))
    return all(a[key] == b[key] for key in MATCHED) and (None in devices or devices[0] == devices[1])


def _flat(meta: dict[str, Any], before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, of in meta.items():
        if isinstance(of, dict):
            found |= _flat(of, f"{before}{key}: ") if key not in UNLIKE else {}
        elif key not in UNLIKE:
            found[f"{before}{key}".replace("_", " ")] = f"{of:g}" if isinstance(of, float) else str(of)
    return found


def _table(pairs: list[tuple[Row, Row]]) -> Table:
    table = Table(title="B / A: below 1 is less memory, above 1 more throughput")
    with_device = any(_device(pair) for pair in pairs)
    modes = {a["mode"] for a, _ in pairs}
    # What a mode does not already say.
    texts = [x for x in MATCHED[3:] if len({(a["mode"], a[x]) for a, _ in pairs}) > len(modes)]
    headings = ["mode", "audio\ntokens", *(name.replace("_", "\n") for name in texts), "method"]
    for heading in headings + ["device"] * with_device:
        right = "tokens" in heading or "size" in heading
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading == "method")
    for heading, _ in FIGURES.values():
        for column in (f"{heading}\nA", "\nB", "\nB / A"):
            table.add_column(column, justify="right")
    previous = None
    for a, b in pairs:
        point = (a["mode"], *(a[key] for key in MATCHED[2:]))
        if previous not in (None, point):
            table.add_section()
        previous = point
        cells = [a["mode"], f"{a['audio_tokens']:,}", *(str(a[name]) for name in texts), label(a["method"])]
        cells += [short(_device((a, b)))] * with_device
        for key, (_, write) in FIGURES.items():
            of_both = ratio(a, b, key)
            cells += [x["status"] if x["status"] != "ok" and key == MEMORY else write(value(x, key)) for x in (a, b)]
            cells.append("" if of_both is None else f"{of_both:.3f}")
        table.add_row(*cells)
    return table


def _device(pair: tuple[Row, Row]) -> str | None:
    return pair[0].get("device") or pair[1].get("device")


def _alone(rows: list[Row]) -> list[str]:
    """Points without a partner, in a line for all that differ in method and audio tokens alone."""
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
