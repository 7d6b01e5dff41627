"""The tables that tell what a result document says."""

from __future__ import annotations

from typing import Any

from palkernels.bench.report.conditions import mode_title, short
from palkernels.bench.report.document import ERRORS, GIB, PARTS, Row
from palkernels.bench.report.points import (
    ABOVE_STATIC,
    EAGER_RATE,
    EAGER_SECONDS,
    MEMORY,
    PUBLISHED,
    RATE,
    RATES,
    SECONDS,
    Points,
    relative,
    waterfall,
)
from palkernels.bench.report.roles import BASELINE, BASELINES, LEVERS, MODES, OURS, against, label
from palkernels.bench.report.table import Column, Table, change, factor, gib, number

__all__ = [
    "breakdown", "eager_summary", "every_point", "exponents", "gains", "launched", "levers", "paper", "serving",
    "short_clips", "steps", "summary",
]  # fmt: skip

MEMORY_GROUPS = {MEMORY: "peak memory", ABOVE_STATIC: "above static"}
MODES_OF_LAUNCH = {RATE: "captured", EAGER_RATE: "eager", SECONDS: "captured", EAGER_SECONDS: "eager"}


def every_point(points: Points, mode: str) -> Table:
    """Every point of a mode, with its gains over the baselines and the error where it was measured, too."""
    with_errors = any(ERRORS in row for row in points.rows)
    memory = tuple(MEMORY_GROUPS)
    return _point_table(points, mode, BASELINES, memory, points.rates, with_attention=True, with_errors=with_errors)


def summary(points: Points, mode: str) -> Table:
    """Every point of a mode in at most 80 columns: gains over PLITS alone; memory above the static part gives way to a
    second device. Throughput is that of captured graphs where eager mode has a table of its own."""
    memory = tuple(MEMORY_GROUPS) if len(points.devices) == 1 else (MEMORY,)
    return _point_table(points, mode, (BASELINE,), memory, (RATE,), with_attention=False, with_errors=False)


def eager_summary(points: Points, mode: str) -> Table | None:
    """The throughput of every point of a mode in eager mode; None where nothing tells it from captured graphs."""
    if EAGER_RATE not in points.rates:
        return None
    return _point_table(points, mode, (BASELINE,), (), (EAGER_RATE,), with_attention=False, with_errors=False)


def _point_table(
    points: Points,
    mode: str,
    baselines: tuple[str, ...],
    memory: tuple[str, ...],
    rates: tuple[str, ...],
    *,
    with_attention: bool,
    with_errors: bool,
) -> Table:
    bases = [name for name in baselines if name in points.methods(mode)]
    headings = [against(base) for base in bases]
    error = ["error"] * with_errors
    columns = [Column("audio tokens"), Column("method", text=True)]
    columns += [Column("attention", text=True)] * with_attention
    for key in memory:
        with_error = error if key == MEMORY else []
        columns += [Column(heading, MEMORY_GROUPS[key]) for heading in ["GiB", *headings, *with_error]]
    speeds = [(device, key) for device in points.devices for key in rates]
    for device, key in speeds:
        group = launched("throughput", device, key, points.rates)
        columns += [Column(heading, group) for heading in ["samples/s", *headings, *error]]
    table = Table(_title(points, mode), columns)

    def errors(key: str, method: str, count: int, devices: list[str | None]) -> list[str]:
        """The error of the first device that has one: a point is measured on one device, and memory is the same on
        all."""
        rows = [row for device in devices if (row := points.row(mode, method, count, device))]
        shares = [row[ERRORS].get(key) for row in rows if ERRORS in row]
        return [change(shares[0] if shares else None)] * with_errors

    for count in points.counts(mode):
        for method in points.methods(mode):
            row = points.row(mode, method, count)
            if row is None:
                continue
            cells = [f"{count:,}", label(method), *[str(row.get("impl", ""))] * with_attention]
            table.rows.append(cells)
            if row["status"] != "ok":
                cells.append(row["status"])
                continue
            for key in memory:
                cells.append(gib(points.value(key, mode, method, count)))
                cells += [change(points.change(key, mode, method, base, count)) for base in bases]
                cells += errors(key, method, count, points.devices) if key == MEMORY else []
            for device, key in speeds:
                cells.append(number(points.value(key, mode, method, count, device)))
                cells += [factor(points.change(key, mode, method, base, count, device)) for base in bases]
                cells += errors(key, method, count, [device])
    return table


def launched(what: str, device: str | None, key: str, rates: tuple[str, ...]) -> str:
    """Return a quantity's name with its device, and with how kernels are launched if `rates` tell that apart."""
    named = " ".join(filter(None, (what, short(device))))
    return ", ".join(filter(None, (named, MODES_OF_LAUNCH[key]))) if len(rates) > 1 else named


def gains(points: Points, mode: str, key: str, device: str | None) -> Table:
    """LAL's gain in one figure: a row for each baseline, a column for each number of audio tokens."""
    counts = points.counts(mode)
    table = Table("", [Column("", text=True), *(Column(f"{count:,}") for count in counts)])
    write = factor if key in RATES else change
    for base in BASELINES:
        cells = [write(points.change(key, mode, OURS, base, count, device)) for count in counts]
        table.rows.append([f"{label(OURS)} {against(base)}", *cells])
    return table


def paper(points: Points, published_alone: bool = False) -> Table | None:
    """The published gains beside LAL's here; None without a baseline and LAL. `published_alone` leaves out quantities
    of which nothing is published."""
    counts = points.counts()
    columns = [Column("LAL", text=True), Column("published", text=True)]
    table = Table("", columns + [Column(f"{count:,}", "audio tokens") for count in counts])
    quantities: list[tuple[str, str, str | None]] = [
        ("peak memory", MEMORY, None),
        ("memory above static", ABOVE_STATIC, None),
    ]
    for device in points.devices:
        on = "throughput" + (f" on {short(device)}" if device else "")
        quantities += [(launched(on, None, key, points.rates), key, device) for key in points.rates]
    for mode in MODES:
        for name, key, device in quantities:
            if published_alone and (mode, key) not in PUBLISHED:
                continue
            for base in BASELINES:
                changes = [points.change(key, mode, OURS, base, count, device) for count in counts]
                if any(x is not None for x in changes):
                    published = PUBLISHED.get((mode, key)) if base == BASELINE else None
                    heading = f"{mode_title(mode)}: {name}, against {label(base)}"
                    table.rows.append([heading, published.text if published else "", *map(change, changes)])
    return table if table.rows else None


def steps(points: Points, mode: str, key: str, device: str | None = None) -> Table | None:
    """The way from PLITS to LAL step by step, for each number of audio tokens, in memory or seconds; None where there
    is nothing to compare."""
    scale, unit, write = (1.0, "GiB", gib) if key == MEMORY else (1e3, "ms", number)
    quantity = "peak memory" if key == MEMORY else "time of a step" if mode == "train" else "time of a batch"
    on = launched(f" on {device}" if device else "", None, key, points.rates) if key != MEMORY else ""
    table = Table(f"{mode_title(mode)}: {quantity}{on}", [Column("", text=True)])
    methods = points.methods(mode)
    chain = waterfall(dict.fromkeys(methods))
    between = [f"to {label(step.end)} ({step.what})" for step in chain]
    table.rows = [[name] for name in (label(BASELINE), *between, label(OURS), "the whole gain")]

    def end(method: str, count: int) -> list[str]:
        size, row = points.value(key, mode, method, count, device), points.row(mode, method, count, device)
        return [write(scale * size) if size is not None else row["status"] if row else "", ""]

    def fall(saved: float | None, share: float | None) -> list[str]:
        if saved is None:
            return ["", ""]
        signed = ("+" if saved < 0 else "") + write(0.0 - scale * saved)
        return [signed, "" if share is None else f"{100 * share:.1f} %"]

    is_compared = False
    for count in points.counts(mode) if chain else ():
        table.columns += [Column(heading, f"{count:,} audio tokens") for heading in (unit, "share")]
        values = {method: points.value(key, mode, method, count, device) for method in methods}
        falls = [fall(step.saved, step.share) for step in waterfall(values)]
        first, last = values[BASELINE], values[OURS]
        whole = ["", ""]
        if first is not None and last is not None:
            whole, is_compared = fall(first - last, 1.0 if first != last else None), True
        for row, pair in zip(table.rows, [end(BASELINE, count), *falls, end(OURS, count), whole], strict=True):
            row += pair
    return table if is_compared else None


def breakdown(points: Points, mode: str) -> Table | None:
    """What memory consists of at its peak."""
    index = {
        (row["audio_tokens"], row["method"]): row
        for row in points.rows
        if row["mode"] == mode and row.get("memory_breakdown")
    }
    if not index:
        return None
    parts = [part for part in PARTS if any(part in row["memory_breakdown"] for row in index.values())]
    columns = [Column("audio tokens"), Column("method", text=True)]
    table = Table(_title(points, mode), [*columns, *(Column(part, "GiB") for part in parts), Column("peak", "GiB")])
    for count in points.counts(mode):
        for method in points.methods(mode):
            if row := index.get((count, method)):
                sizes = [row["memory_breakdown"].get(part) for part in parts]
                cells = [gib(None if size is None else size / GIB) for size in (*sizes, row["peak_memory_bytes"])]
                table.rows.append([f"{count:,}", label(method), *cells])
    return table


def levers(points: Points) -> Table | None:
    """What each lever of training memory saves against LAL without it, and its price in time."""
    mode = "train"
    tried = [name for name in LEVERS if name in points.methods(mode)]
    if not tried:
        return None
    columns = [Column("audio tokens"), Column("method", text=True)]
    for group in MEMORY_GROUPS.values():
        columns += [Column("GiB", group), Column(against(OURS), group)]
    speeds = [(device, key) for device in points.devices for key in (SECONDS, EAGER_SECONDS)[: len(points.rates)]]
    for device, key in speeds:
        group = launched("step", device, key, points.rates)
        columns += [Column("ms", group), Column(against(OURS), group)]
    table = Table(_title(points, mode), columns)
    for count in points.counts(mode):
        for method in (OURS, *tried):
            row = points.row(mode, method, count)
            if row is None:
                continue
            cells = [f"{count:,}", label(method)]
            table.rows.append(cells)
            if row["status"] != "ok":
                cells.append(row["status"])
                continue
            for key in MEMORY_GROUPS:
                cells.append(gib(points.value(key, mode, method, count)))
                cells.append(change(points.change(key, mode, method, OURS, count)))
            for device, key in speeds:
                seconds = points.value(key, mode, method, count, device)
                cells.append(number(None if seconds is None else 1e3 * seconds))
                cells.append(change(points.change(key, mode, method, OURS, count, device)))
    return table


def serving(rows: list[Row]) -> Table | None:
    """Questions about clips, answered in one batch."""
    if not rows:
        return None
    devices = list(dict.fromkeys(row.get("device") for row in rows))
    columns = [Column("clips"), Column("questions"), Column("method", text=True)]
    columns += [Column("MiB per clip", "K/V"), Column(against(BASELINE), "K/V")]
    first = rows[0]
    rates = RATES if "eager_tokens_per_second" in first else RATES[:1]
    headings = ("first token, ms", against(BASELINE), "tokens/s", against(BASELINE))
    for device in devices:
        columns += [Column(heading, launched("", device, key, rates)) for key in rates for heading in headings]
    sizes = f"{first['audio_tokens']:,} audio, {first['text_tokens']} text and {first['new_tokens']} new tokens"
    table = Table(f"{sizes}, {first['dtype']}", columns)
    index = {(row["clips"], row["questions"], row["method"], row.get("device")): row for row in rows}

    def figure(key: str, clips: int, questions: int, method: str, device: str | None) -> float | None:
        row = index.get((clips, questions, method, device))
        return row[key] if row and row["status"] == "ok" else None

    quantities = [("kv_bytes_per_clip", rows[0].get("device"), 1 / 2**20, change)]
    for device in devices:
        for prefix in ("", "eager_")[: len(rates)]:
            quantities.append((f"{prefix}first_token_seconds", device, 1e3, change))
            quantities.append((f"{prefix}tokens_per_second", device, 1.0, factor))
    for clips, questions, method in dict.fromkeys(key[:3] for key in index):
        cells = [str(clips), str(questions), label(method)]
        table.rows.append(cells)
        row = next(row for key, row in index.items() if key[:3] == (clips, questions, method))
        if row["status"] != "ok":
            cells.append(row["status"])
            continue
        for key, device, scale, write in quantities:
            ours, base = (figure(key, clips, questions, name, device) for name in (method, BASELINE))
            cells.append(number(None if ours is None else scale * ours))
            cells.append(write(None if method == BASELINE else relative(ours, base)))
    return table


def short_clips(rows: list[Row]) -> Table | None:
    """Training steps of whole audio LLMs on clips that fill a part of the encoder's window."""
    if not rows:
        return None
    first = rows[0]
    columns = [Column("clip, s"), Column(f"states of {first['window_tokens']:,}"), Column("method", text=True)]
    columns += [Column("samples/s", "throughput"), Column(against(BASELINE), "throughput")]
    by_cores = first["processor_seconds_per_sample"] is not None
    columns += [Column("a sample", "CPU seconds"), Column(against(BASELINE), "CPU seconds")] if by_cores else []
    title = f"Whole models, training: batch {first['batch_size']}, {first['text_tokens']} text tokens, {first['dtype']}"
    table = Table(title, columns)
    index = {(row["seconds"], row["method"]): row for row in rows}
    for (seconds, method), row in index.items():
        base = index.get((seconds, BASELINE))
        cells = [f"{seconds:g}", f"{row['audio_tokens']:,}", label(method)]
        rate, spent = row["samples_per_second"]["p50"], row["processor_seconds_per_sample"]
        rates = None if method == BASELINE or base is None else relative(rate, base["samples_per_second"]["p50"])
        cells += [number(rate), factor(rates)]
        if by_cores:
            both = None if method == BASELINE or base is None else relative(spent, base["processor_seconds_per_sample"])
            cells += [number(spent), change(both)]
        table.rows.append(cells)
    return table


def exponents(fits: list[dict[str, Any]]) -> Table | None:
    """The p of growth ~ length ** p. Memory and FLOPs are the same on every GPU."""
    if not fits:
        return None
    devices = list(dict.fromkeys(fit["device"] for fit in fits))
    methods = list(dict.fromkeys(fit["method"] for fit in fits))
    shown = [(SECONDS, f"time {short(device)}", device) for device in devices]
    shown += [(ABOVE_STATIC, "memory above static", devices[0]), ("attention_flops", "attention FLOPs", devices[0])]
    columns = [Column("", text=True), Column("with", text=True)]
    columns += [Column(label(method), group) for _, group, _ in shown for method in methods]
    table = Table("", columns)
    keys = ("mode", "varies", "quantity", "device", "method")
    index = {tuple(fit[key] for key in keys): fit["exponent"] for fit in fits}
    for mode, varies in dict.fromkeys((fit["mode"], fit["varies"]) for fit in fits):
        cells = [index.get((mode, varies, quantity, device, name)) for quantity, _, device in shown for name in methods]
        written = ["" if x is None else f"{x:.2f}" for x in cells]
        table.rows.append([mode_title(mode), varies.replace("_", " "), *written])
    return table


def _title(points: Points, mode: str) -> str:
    row = next(row for row in points.rows if row["mode"] == mode)
    return f"{mode_title(mode)}: batch {row['batch_size']}, {row['text_tokens']} text tokens, {row['dtype']}"
