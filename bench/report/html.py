"""From a result document to the files of a run; among them a report, one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from palkernels.bench.methods import LEVERS, METHODS, MODES
from palkernels.bench.report import charts, conditions, plot, tables
from palkernels.bench.report.conditions import TITLES, label, short
from palkernels.bench.report.document import csv_text
from palkernels.bench.report.points import BASELINES, MEMORY, RATE, Points
from palkernels.bench.report.style import svg
from palkernels.bench.report.tables import Table

__all__ = ["files", "html", "json_text"]

TEMPLATES = Path(__file__).parent


@dataclass
class Section:
    """What a heading of the report is over: words, pictures and tables."""

    name: str  # in links
    heading: str
    words: list[str]
    pictures: list[tuple[str, str]] = field(default_factory=list)  # a data URI, and what it shows
    tables: list[Table] = field(default_factory=list)
    terms: list[tuple[str, str]] = field(default_factory=list)
    code: str = ""  # the term that is explained by a command line


def json_text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def files(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, bytes]:
    """The content of each file, which its ending asks for: .json, .csv, .png or .html."""
    write = {
        ".json": lambda: json_text(document),
        ".csv": lambda: csv_text(document["rows"], document["meta"].get("encoder_weights")).encode(),
        ".png": lambda: plot.render(document),
        ".html": lambda: html(document).encode(),
    }
    return {name: write[Path(name).suffix]() for name in names}


def html(document: dict[str, Any]) -> str:
    """The report of a document that figure1 or simulate wrote."""
    meta = document["meta"]
    by_text = Points.by_text_tokens(document["rows"])
    sections: list[Section | None] = [
        Section("conditions", "Conditions", [], terms=conditions.listed(meta), code="To repeat it"),
        _methods(document),
        _figure(document),
    ]
    for count, points in by_text.items():
        named = f", {count:,} text tokens" if len(by_text) > 1 else ""
        sections += _of_points(meta, points, named, str(count) if named else "")
    sections += [_lengths(document), _serving(document)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    shown = [section for section in sections if section is not None]
    page = environment.get_template("report.html")
    return page.render(
        looks=_looks,
        title=conditions.title(meta),
        kind=conditions.kind(meta),
        summary=_summary(by_text),
        sections=shown,
    )


def _summary(by_text: dict[int, Points]) -> list[str]:
    """A sentence per mode, at the most audio tokens at which LAL and a baseline ran."""
    sentences = []
    for points in list(by_text.values())[:1]:
        for mode in MODES:
            for count in reversed(points.counts(mode)):
                if gains := [x for base in BASELINES if (x := _gain(points, mode, base, count))]:
                    sentences.append(f"{TITLES[mode]} with {count:,} audio tokens: {'; '.join(gains)}.")
                    break
    return sentences


def _gain(points: Points, mode: str, base: str, count: int) -> str:
    ours, theirs = (points.value(MEMORY, mode, method, count) for method in ("lal", base))
    if ours is None or theirs is None:
        return ""
    memory = f"{ours:.2f} instead of {theirs:.2f} GiB ({tables.change(ours / theirs - 1)})"
    rates = [
        tables.factor(points.change(RATE, mode, "lal", base, count, device))
        + (f" on {short(device)}" if device else "")
        for device in points.devices
    ]
    return f"LAL against {label(base)}: peak memory {memory}, throughput {' and '.join(rates)}"


def _looks(table: Table) -> list[str]:
    """The classes of each column's cells."""
    found = []
    for before, column in zip([None, *table.columns], table.columns, strict=False):
        edge = before is not None and column.group != before.group
        found.append(" ".join(filter(None, ("text" if column.text else "", "edge" if edge else ""))))
    return found


def _methods(document: dict[str, Any]) -> Section:
    names = Points(document["rows"]).methods()
    about = [(METHODS[name].label, METHODS[name].about) for name in names if name in METHODS]
    return Section("methods", "Methods", [], terms=about)


def _figure(document: dict[str, Any]) -> Section:
    levers = any(row["method"] in LEVERS for row in document["rows"])
    words = ["Levers of training memory are not in the picture; they have a table."] if levers else []
    picture = _picture(plot.draw(document), "Memory and throughput against audio tokens")
    return Section("figure-1", "Figure 1", words, [picture])


def _of_points(meta: dict[str, Any], points: Points, named: str, suffix: str) -> list[Section]:
    """The sections on one number of text tokens."""
    modes = [mode for mode in MODES if points.counts(mode)]

    def section(name: str, heading: str, words: list[str], found: list[Table | None], **more: Any) -> list[Section]:
        kept = [table for table in found if table is not None]
        return [Section(name + suffix, heading + named, words, tables=kept, **more)] if kept else []

    words = [
        "Changes and factors are against the baselines at the same point. Above static is the peak "
        "of what is neither parameter, gradient nor optimizer state; it may come at another moment than the whole's.",
    ]
    if any("error_against_measured" in row for row in points.rows):
        words.append("The error is the prediction's against the measured figure: +5 % is 5 % too high.")
    sections = section("points", "All points", words, [tables.points(points, mode) for mode in modes])
    words = [
        "What is published of LAL over PLITS (arXiv 2506.10423; v2 gives its largest gains), beside LAL over both "
        "baselines here.",
    ]
    sections += section("paper", "The paper's setting", words, [tables.paper(points)])
    words = [
        "From PLITS to LAL one change at a time: what each saves (-) or costs (+), and its share of the whole gain.",
    ]
    falls = [tables.steps(points, mode, MEMORY) for mode in modes]
    falls += [tables.steps(points, mode, "seconds", device) for mode in modes for device in points.devices]
    sections += section("gain", "Where the gain comes from", words, falls)
    parts = [tables.breakdown(points, mode) for mode in modes]
    if any(parts):
        picture = _picture(charts.draw_memory(meta, points), "What memory consists of at its peak")
        words = ["At the moment of the peak."]
        sections += section("memory", "What memory consists of", words, parts, pictures=[picture])
    words = ["What saves training memory beyond LAL itself, and what it costs in time."]
    return sections + section("levers", "Levers of training memory", words, [tables.levers(points)])


def _lengths(document: dict[str, Any]) -> Section | None:
    if not document.get("lengths"):
        return None
    modes = list(dict.fromkeys(row["mode"] for row in document["lengths"]))
    pictures = [_picture(charts.draw_lengths(document, mode), f"{TITLES[mode]}: cost against length") for mode in modes]
    table = tables.exponents(document.get("exponents", []))
    words = [
        "The table has p in growth ~ length to the power of p, where growth is what a cost has beyond its value at the "
        "shortest length. It is fitted to the longer half.",
    ]
    return Section("lengths", "Cost against length", words, pictures, [] if table is None else [table])


def _serving(document: dict[str, Any]) -> Section | None:
    table = tables.serving(document.get("serving", []))
    words = [
        "Questions about clips, answered in one batch; LAL keeps a clip's keys and values once for all its questions."
    ]
    return None if table is None else Section("serving", "Serving", words, tables=[table])


def _picture(figure: Any, shows: str) -> tuple[str, str]:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode(), shows
