"""The tables of a result document, in text, for reports and README alike. "" is a cell without a figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from palkernels.bench.methods import LEVERS, MODES
from palkernels.bench.report.conditions import TITLES, label, short
from palkernels.bench.report.document import GIB, Row
from palkernels.bench.report.points import ABOVE_STATIC, BASELINES, MEMORY, PUBLISHED, RATE, Points, waterfall

__all__ = [
    "Column", "Table", "breakdown", "change", "exponents", "factor", "gib", "levers", "number", "paper", "points",
    "serving", "steps",
]  # fmt: skip

AGAINST = {"plits": "vs PLITS", "plits-tuned": "vs tuned"}
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "K/V cache", "temporaries")


@dataclass(frozen=True)
class Column:
    """`group` is written once above columns that share it."""

    heading: str
    group: str = ""
    text: bool = False  # left-aligned


@dataclass
class Table:
    """A row that ends early says last why it has no figures."""

    title: str
    columns: list[Column]
    rows: list[list[str]] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each with the number of its columns."""
        return [(name, len(list(some))) for name, some in groupby(column.group for column in self.columns)]


def gib(size: float | None) -> str:
    """Two digits after the point, of small sizes four."""
    return "" if size is None else f"{size:.{4 if 5e-5 <= abs(size) < 0.0095 else 2}f}"


def number(x: float | None) -> str:
    """Three digits or more: 0.0734, 7.28, 5,440."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:#.3g}".removesuffix(".")


def change(share: float | None) -> str:
    return "" if share is None else f"{round(100 * share, 1) + 0.0:+,.1f} %"  # + 0.0: no "-0.0"


def factor(share: float | None) -> str:
    """A change of a rate as what it is multiplied by: 2.00x."""
    return "" if share is None else f"{1 + share:.2f}x"


def points(found: Points, mode: str) -> Table:
    """Every point of a mode, with its gains over the baselines."""
    bases = [name for name in BASELINES if name in found.methods(mode)]
    errors = any("error_against_measured" in row for row in found.rows)
    error = ["error"] if errors else []
    groups = [("peak memory", "GiB", MEMORY), ("above static", "GiB", ABOVE_STATIC)]
    columns = [Column("audio tokens"), Column("method", text=True), Column("attention", text=True)]
    for group, unit, key in groups:
        columns += [Column(heading, group) for heading in [unit, *(AGAINST[base] for base in bases)]]
        columns += [Column(heading, group) for heading in error if key == MEMORY]
    for device in found.devices:
        group = " ".join(filter(None, ("throughput", short(device))))
        columns += [Column(x, group) for x in ["samples/s", *(AGAINST[base] for base in bases), *error]]
    table = Table(_title(found, mode), columns)

    def off(key: str, method: str, count: int, devices: list[str | None]) -> list[str]:
        """The first of the devices' errors: it was measured on one of them, and memory is the same on all."""
        rows = [row for device in devices if (row := found.row(mode, method, count, device))]
        off_by = [row["error_against_measured"][key] for row in rows if "error_against_measured" in row]
        return [change(off_by[0] if off_by else None) for _ in error]

    for count in found.counts(mode):
        for method in found.methods(mode):
            row = found.row(mode, method, count)
            if row is None:
                continue
            cells = [f"{count:,}", label(method), row.get("impl", "")]
            if row["status"] != "ok":
                table.rows.append([*cells, row["status"]])
                continue
            for _, _, key in groups:
                cells.append(gib(found.value(key, mode, method, count)))
                cells += [change(found.change(key, mode, method, base, count)) for base in bases]
                cells += off(key, method, count, found.devices) if key == MEMORY else []
            for device in found.devices:
                cells.append(number(found.value(RATE, mode, method, count, device)))
                cells += [factor(found.change(RATE, mode, method, base, count, device)) for base in bases]
                cells += off(RATE, method, count, [device])
            table.rows.append(cells)
    return table


def paper(found: Points, published_alone: bool = False) -> Table | None:
    """What is published beside LAL's gains here, or only the quantities of which something is published; None without a
    baseline and LAL."""
    counts = found.counts()
    columns = [Column("LAL", text=True), Column("published", text=True)]
    table = Table("", columns + [Column(f"{count:,}", "audio tokens") for count in counts])
    for mode in MODES:
        quantities = [
            ("peak memory", MEMORY, found.devices[0]),
            ("memory above static", ABOVE_STATIC, found.devices[0]),
        ]
        for name, key, device in (*quantities, *(("throughput", RATE, device) for device in found.devices)):
            if published_alone and (mode, key) not in PUBLISHED:
                continue
            on = f" on {short(device)}" if key == RATE and device else ""
            for base in BASELINES:
                changes = [found.change(key, mode, "lal", base, count, device) for count in counts]
                if any(x is not None for x in changes):
                    what = f"{TITLES[mode]}: {name}{on}, against {label(base)}"
                    published = PUBLISHED.get((mode, key)) if base == "plits" else None
                    table.rows.append([what, published.text if published else "", *map(change, changes)])
    return table if table.rows else None


def steps(found: Points, mode: str, key: str, device: str | None = None) -> Table | None:
    """From the baseline to LAL, step by step, for each number of audio tokens. `key` is `peak_memory_bytes` or
    `seconds`; None where there is nothing to compare."""
    scale, unit, write = (1.0, "GiB", gib) if key == MEMORY else (1e3, "ms", number)
    what = "peak memory" if key == MEMORY else "time of a step" if mode == "train" else "time of a batch"
    on = f" on {device}" if device and key != MEMORY else ""
    table = Table(f"{TITLES[mode]}: {what}{on}", [Column("", text=True)])
    chain = waterfall(dict.fromkeys(found.methods(mode)))
    between = [f"to {label(step.end)} ({step.what})" for step in chain]
    table.rows = [[name] for name in (label("plits"), *between, label("lal"), "the whole gain")]

    def end(method: str, count: int) -> list[str]:
        size, row = found.value(key, mode, method, count, device), found.row(mode, method, count, device)
        return [write(scale * size) if size is not None else row["status"] if row else "", ""]

    def signed(saved: float | None, share: float | None) -> list[str]:
        if saved is None:
            return ["", ""]
        return [
            ("+" if saved < 0 else "") + write(0.0 - scale * saved),
            "" if share is None else f"{100 * share:.1f} %",
        ]

    compared = False
    for count in found.counts(mode) if chain else ():
        table.columns += [Column(heading, f"{count:,} audio tokens") for heading in (unit, "share")]
        values = {method: found.value(key, mode, method, count, device) for method in found.methods(mode)}
        falls = [(step.saved, step.share) for step in waterfall(values)]
        first, last = values["plits"], values["lal"]
        whole = (None, None) if first is None or last is None else (first - last, 1.0 if first != last else None)
        compared |= first is not None and last is not None
        cells = [end("plits", count), *(signed(*fall) for fall in falls), end("lal", count), signed(*whole)]
        for line, pair in zip(table.rows, cells, strict=True):
            line += pair
    return table if compared else None


def breakdown(found: Points, mode: str) -> Table | None:
    """What memory consists of at its peak."""
    rows = {(x["audio_tokens"], x["method"]): x for x in found.rows if x["mode"] == mode and x.get("memory_breakdown")}
    if not rows:
        return None
    parts = [part for part in PARTS if any(part in row["memory_breakdown"] for row in rows.values())]
    columns = [Column("audio tokens"), Column("method", text=True)]
    table = Table(_title(found, mode), [*columns, *(Column(part, "GiB") for part in parts), Column("peak", "GiB")])
    for count in found.counts(mode):
        for method in found.methods(mode):
            if row := rows.get((count, method)):
                sizes = [row["memory_breakdown"].get(part) for part in parts]
                cells = [gib(None if size is None else size / GIB) for size in (*sizes, row["peak_memory_bytes"])]
                table.rows.append([f"{count:,}", label(method), *cells])
    return table


def levers(found: Points) -> Table | None:
    """What saves more training memory, against LAL without it, and its price; or why it did not run."""
    tried = [name for name in LEVERS if name in found.methods("train")]
    if not tried:
        return None
    columns = [Column("audio tokens"), Column("method", text=True)]
    for group in ("peak memory", "above static"):
        columns += [Column("GiB", group), Column("vs LAL", group)]
    for device in found.devices:
        columns += [Column(x, " ".join(filter(None, ("step", short(device))))) for x in ("ms", "vs LAL")]
    table = Table(_title(found, "train"), columns)
    for count in found.counts("train"):
        for method in ("lal", *tried):
            row = found.row("train", method, count)
            if row is None:
                continue
            cells = [f"{count:,}", label(method)]
            if row["status"] != "ok":
                table.rows.append([*cells, row["status"]])
                continue
            about = ("train", method, count)
            for key in (MEMORY, ABOVE_STATIC):
                against = found.change(key, "train", method, "lal", count)
                cells += [gib(found.value(key, *about)), change(against)]
            for device in found.devices:
                seconds = found.value("seconds", *about, device)
                against = found.change("seconds", "train", method, "lal", count, device)
                cells += [number(None if seconds is None else 1e3 * seconds), change(against)]
            table.rows.append(cells)
    return table


def serving(rows: list[Row]) -> Table | None:
    """Questions about clips, answered in one batch."""
    if not rows:
        return None
    devices = list(dict.fromkeys(row.get("device") for row in rows))
    columns = [Column("clips"), Column("questions"), Column("method", text=True)]
    columns += [Column("MiB per clip", "K/V"), Column("vs PLITS", "K/V")]
    for device in devices:
        group = short(device)
        columns += [Column(x, group) for x in ("first token, ms", "vs PLITS", "tokens/s", "vs PLITS")]
    first = rows[0]
    sizes = f"{first['audio_tokens']:,} audio, {first['text_tokens']} text and {first['new_tokens']} new tokens"
    table = Table(f"{sizes}, {first['dtype']}", columns)
    index = {(row["clips"], row["questions"], row["method"], row.get("device")): row for row in rows}
    for clips, questions, method in dict.fromkeys(key[:3] for key in index):

        def cells(
            key: str, device: str | None, scale: float, write: Callable[[float | None], str],
            method: str = method, clips: int = clips, questions: int = questions,
        ) -> list[str]:  # fmt: skip
            mine, base = (index.get((clips, questions, name, device)) for name in (method, "plits"))
            size, other = (x[key] if x and x["status"] == "ok" else None for x in (mine, base))
            against = None if size is None or not other or method == "plits" else size / other - 1
            return [number(None if size is None else scale * size), write(against)]

        row = next(x for key, x in index.items() if key[:3] == (clips, questions, method))
        line = [str(clips), str(questions), label(method)]
        if row["status"] != "ok":
            table.rows.append([*line, row["status"]])
            continue
        line += cells("kv_bytes_per_clip", row.get("device"), 1 / 2**20, change)
        for device in devices:
            line += cells("first_token_seconds", device, 1e3, change)
            line += cells("tokens_per_second", device, 1.0, factor)
        table.rows.append(line)
    return table


def exponents(fits: list[dict[str, Any]]) -> Table | None:
    """The p of growth ~ length ** p; memory and FLOPs are every GPU's."""
    if not fits:
        return None
    devices = list(dict.fromkeys(fit["device"] for fit in fits))
    methods = list(dict.fromkeys(fit["method"] for fit in fits))
    shown = [("seconds", f"time {short(device)}", device) for device in devices]
    shown += [
        ("peak_above_static_bytes", "memory above static", devices[0]),
        ("attention_flops", "attention FLOPs", devices[0]),
    ]
    columns = [Column("", text=True), Column("with", text=True)]
    columns += [Column(label(method), group) for _, group, _ in shown for method in methods]
    table = Table("", columns)
    index = {(x["mode"], x["varies"], x["quantity"], x["device"], x["method"]): x["exponent"] for x in fits}
    for mode, varies in dict.fromkeys((fit["mode"], fit["varies"]) for fit in fits):
        cells = [index.get((mode, varies, key, device, method)) for key, _, device in shown for method in methods]
        written = ["" if x is None else f"{x:.2f}" for x in cells]
        table.rows.append([TITLES[mode], varies.replace("_", " "), *written])
    return table


def _title(found: Points, mode: str) -> str:
    row = next(x for x in found.rows if x["mode"] == mode)
    return f"{TITLES[mode]}: batch {row['batch_size']}, {row['text_tokens']} text tokens, {row['dtype']}"
