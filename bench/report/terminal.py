"""Tables on a terminal.

rich's tables have no headings over several columns and cut what does not fit, so lines are laid out here. Nothing that
a document says is read as rich's markup.
"""

from __future__ import annotations

import textwrap
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.text import Text

from palkernels.bench.report import tables
from palkernels.bench.report.compiled import compiled
from palkernels.bench.report.conditions import host, is_simulated
from palkernels.bench.report.points import Points
from palkernels.bench.report.roles import BASELINE, MODES, label
from palkernels.bench.report.table import Table

__all__ = ["layout", "print_points", "print_table"]

NARROWEST = 12  # width at which columns of text stop shrinking where a table is too wide


def print_points(document: dict[str, Any], console: Console) -> None:
    """Print a table for each number of text tokens and mode of a result document, one of clips that fill a part of the
    window, and notes that explain them."""
    for points in Points.by_text_tokens(document["rows"]).values():
        for mode in MODES:
            if points.counts(mode):
                for table in (tables.summary(points, mode), tables.eager_summary(points, mode)):
                    if table is not None:
                        print_table(table, console)
                        console.print()
    generated = compiled(document.get("compiled", []))
    for table in (generated, tables.short_clips(document.get("short_clips", []))):
        if table is not None:
            print_table(table, console)
            console.print()
    for note in _notes(document):
        console.print(Text(note))


def _notes(document: dict[str, Any]) -> list[str]:
    meta, rows = document["meta"], document["rows"]
    notes = ["Simulated, not measured."] if is_simulated(meta) else []
    if host(meta):
        notes.append("Captured: a step is one CUDA graph. Eager: the host launches each kernel; the slower one counts.")
    if any(row["method"] == BASELINE for row in rows):
        notes.append(f"vs {label(BASELINE)}: the change of memory, and the speed-up, at the same point.")
    by_attention: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("impl"):
            by_attention.setdefault(row["impl"], {})[label(row["method"])] = None
    notes += [f"Attention by {attention}: {'; '.join(labels)}." for attention, labels in by_attention.items()]
    return notes + ([f"Encoder weights: {meta['encoder_weights']}."] if "encoder_weights" in meta else [])


def print_table(table: Table, console: Console) -> None:
    """Print a table, its columns as narrow as they can be. Lines that are still wider than the console are not cut."""
    if table.title:
        console.print(Text(table.title, style="bold"), soft_wrap=True)
    for line in layout(table, console.width):
        console.print(Text(line), soft_wrap=True)


def layout(table: Table, width: int) -> list[str]:
    """Return the table's lines without its title. Columns of text are folded where the table exceeds `width`."""
    columns, spans = table.columns, _spans(table)
    widths = _widths(table, spans, width)

    def joined(cells: list[str]) -> str:
        padded = [
            cell.ljust(size) if column.text else cell.rjust(size)
            for cell, column, size in zip(cells, columns, widths, strict=False)
        ]
        return "  ".join(" ".join(padded[span.start : span.stop]) for span in spans if span.start < len(cells))

    groups = [_fold(name, _span_width(span, widths)) for (name, _), span in zip(table.groups, spans, strict=True)]
    headings = [_fold(column.heading, size) for column, size in zip(columns, widths, strict=True)]
    lines = []
    for names in _stacked(groups, from_below=True) if any(column.group for column in columns) else []:
        centred = (name.center(_span_width(span, widths)) for name, span in zip(names, spans, strict=True))
        lines.append("  ".join(centred))
    lines += map(joined, _stacked(headings, from_below=True))
    lines.append("  ".join("-" * _span_width(span, widths) for span in spans))
    for index, row in enumerate(table.rows):
        *cells, last = ["", *row[1:]] if table.is_repeat(index) else row
        if table.is_short(row):
            lines.append(f"{joined(cells)}  {last}")
        else:
            folded = [_fold(cell, size) for cell, size in zip([*cells, last], widths, strict=True)]
            lines += map(joined, _stacked(folded))
    return [line.rstrip() for line in lines]


def _spans(table: Table) -> list[range]:
    """Return the columns of each group."""
    ends = list(accumulate(count for _, count in table.groups))
    return [range(end - count, end) for end, (_, count) in zip(ends, table.groups, strict=True)]


def _span_width(span: range, widths: list[int]) -> int:
    return sum(widths[i] for i in span) + len(span) - 1


def _widths(table: Table, spans: list[range], width: int) -> list[int]:
    """Return each column's width: that of its longest cell, or of the longest word of its heading."""
    widths = [max(map(len, column.heading.split()), default=0) for column in table.columns]
    for row in table.rows:
        for i, cell in enumerate(row[:-1] if table.is_short(row) else row):
            widths[i] = max(widths[i], len(cell))
    for (name, _), span in zip(table.groups, spans, strict=True):
        missing = max(map(len, name.split()), default=0) - _span_width(span, widths)
        widths[span.stop - 1] += max(missing, 0)
    excess = sum(_span_width(span, widths) for span in spans) + 2 * (len(spans) - 1) - width
    for _ in range(excess):
        widest = max((i for i, column in enumerate(table.columns) if column.text), key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _fold(text: str, width: int) -> list[str]:
    return [text] if len(text) <= width else textwrap.wrap(text, width)


def _stacked(cells: list[list[str]], *, from_below: bool = False) -> list[list[str]]:
    """Return lines of text side by side, from cells of several lines; shorter cells get blank lines at one end."""
    height = max(map(len, cells))
    missing = [[""] * (height - len(cell)) for cell in cells]
    filled = [gap + cell if from_below else cell + gap for cell, gap in zip(cells, missing, strict=True)]
    return [list(line) for line in zip(*filled, strict=True)]
