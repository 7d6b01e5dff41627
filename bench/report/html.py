"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from palkernels.bench.report import charts, conditions, plot, tables
from palkernels.bench.report.compiled import compiled
from palkernels.bench.report.conditions import mode_title, short
from palkernels.bench.report.points import EAGER_SECONDS, MEMORY, SECONDS, Points
from palkernels.bench.report.roles import BASELINES, LEVERS, MODES, OURS, about, label
from palkernels.bench.report.style import svg
from palkernels.bench.report.table import Table, change, factor

__all__ = ["report_page"]

TEMPLATES = Path(__file__).parent


@dataclass
class Section:
    """A heading of the report with its words, pictures and tables."""

    name: str  # the target of links
    heading: str
    words: list[str]
    pictures: list[tuple[str, str]] = field(default_factory=list)  # a data URI, and a description
    tables: list[Table] = field(default_factory=list)
    terms: list[tuple[str, str]] = field(default_factory=list)  # each with its explanation
    code: str = ""  # the term that is explained by a command line


def report_page(document: dict[str, Any]) -> str:
    """Return the report of a document that figure1 or simulate wrote."""
    meta = document["meta"]
    by_text = Points.by_text_tokens(document["rows"])
    sections: list[Section | None] = [
        Section("conditions", "Conditions", [], terms=conditions.listed(meta), code="To repeat it"),
        _methods(document),
        _figure(document),
    ]
    for count, points in by_text.items():
        suffixes = (f", {count:,} text tokens", str(count)) if len(by_text) > 1 else ("", "")
        sections += _point_sections(meta, points, *suffixes)
    sections += [_lengths(document), _serving(document), _compiled(document), _short_clips(document)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    shown = [section for section in sections if section is not None]
    page = environment.get_template("report.html")
    return page.render(
        classes=_classes,
        title=conditions.title(meta),
        experiment=conditions.experiment(meta),
        summary=_summary(by_text),
        sections=shown,
    )


def _summary(by_text: dict[int, Points]) -> list[str]:
    """Return a sentence for each mode, at the most audio tokens at which LAL and a baseline ran."""
    sentences = []
    for points in list(by_text.values())[:1]:
        for mode in MODES:
            for count in reversed(points.counts(mode)):
                if gains := [text for base in BASELINES if (text := _gain(points, mode, base, count))]:
                    sentences.append(f"{mode_title(mode)} with {count:,} audio tokens: {'; '.join(gains)}.")
                    break
    return sentences


def _gain(points: Points, mode: str, base: str, count: int) -> str:
    ours, theirs = (points.value(MEMORY, mode, method, count) for method in (OURS, base))
    if ours is None or theirs is None:
        return ""
    less = change(points.change(MEMORY, mode, OURS, base, count))
    rates = []
    for device in points.devices:
        multiples = [factor(points.change(key, mode, OURS, base, count, device)) for key in points.rates]
        eager = f" (eager {multiples[1]})" if len(multiples) > 1 else ""
        rates.append(multiples[0] + (f" on {short(device)}" if device else "") + eager)
    memory = f"{ours:.2f} instead of {theirs:.2f} GiB ({less})"
    return f"{label(OURS)} against {label(base)}: peak memory {memory}, throughput {' and '.join(rates)}"


def _classes(table: Table) -> list[str]:
    """Return the CSS classes of each column's cells."""
    classes = []
    for before, column in zip([None, *table.columns], table.columns, strict=False):
        begins_group = before is not None and column.group != before.group
        classes.append(" ".join(filter(None, ("text" if column.text else "", "edge" if begins_group else ""))))
    return classes


def _methods(document: dict[str, Any]) -> Section:
    names = Points(document["rows"]).methods()
    terms = [(label(name), about(name)) for name in names if about(name)]
    return Section("methods", "Methods", [], terms=terms)


def _figure(document: dict[str, Any]) -> Section:
    levers = any(row["method"] in LEVERS for row in document["rows"])
    words = ["Levers of training memory are not in the picture; they have a table."] if levers else []
    picture = _picture(plot.draw(document), "Memory and throughput against audio tokens")
    return Section("figure-1", "Figure 1", words, [picture])


def _point_sections(meta: dict[str, Any], points: Points, heading_suffix: str, name_suffix: str) -> list[Section]:
    """Return the sections on one number of text tokens; those without data are left out."""
    modes = [mode for mode in MODES if points.counts(mode)]

    def section(name: str, heading: str, words: list[str], content: list[Table | None], **more: Any) -> list[Section]:
        filled = [table for table in content if table is not None]
        return [Section(name + name_suffix, heading + heading_suffix, words, tables=filled, **more)] if filled else []

    words = [
        "Changes and factors are against the baselines at the same point. Above static is the peak of what is neither "
        "parameter, gradient nor optimizer state; it may come at another moment than the peak of the whole.",
    ]
    if any("error_against_measured" in row for row in points.rows):
        words.append("The error is the prediction's against the measured figure: +5 % is 5 % too high.")
    sections = section("points", "All points", words, [tables.every_point(points, mode) for mode in modes])
    words = [
        "What is published of LAL over PLITS (arXiv 2506.10423; v2 gives its largest gains), beside LAL over both "
        "baselines here.",
    ]
    sections += section("paper", "The paper's setting", words, [tables.paper(points)])
    words = [
        "From PLITS to LAL one change at a time: what each saves (-) or costs (+), and its share of the whole gain.",
    ]
    falls = [tables.steps(points, mode, MEMORY) for mode in modes]
    times = (SECONDS, EAGER_SECONDS)[: len(points.rates)]
    falls += [tables.steps(points, mode, key, device) for mode in modes for device in points.devices for key in times]
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
    pictures = [
        _picture(charts.draw_lengths(document, mode), f"{mode_title(mode)}: cost against length") for mode in modes
    ]
    table = tables.exponents(document.get("exponents", []))
    words = [
        "The table has p in growth ~ length to the power of p, where growth is what a cost has beyond its value at the "
        "shortest length. It is fitted to the three longest lengths.",
    ]
    return Section("lengths", "Cost against length", words, pictures, [] if table is None else [table])


def _serving(document: dict[str, Any]) -> Section | None:
    table = tables.serving(document.get("serving", []))
    words = [
        "Questions about clips, answered in one batch; LAL keeps a clip's keys and values once for all its questions."
    ]
    return None if table is None else Section("serving", "Serving", words, tables=[table])


def _compiled(document: dict[str, Any]) -> Section | None:
    table = compiled(document.get("compiled", []))
    words = ["With a static cache transformers compiles the steps behind the prompt; on a GPU each is one CUDA graph."]
    return None if table is None else Section("compiled", "Compiled generation", words, tables=[table])


def _short_clips(document: dict[str, Any]) -> Section | None:
    table = tables.short_clips(document.get("short_clips", []))
    words = [
        "Whole audio LLMs, encoder and connector included, on clips that fill a part of the encoder's window. PLITS "
        "has a token for each valid state; LAL leaves the other states out, too."
    ]
    return None if table is None else Section("short-clips", "Clips shorter than the window", words, tables=[table])


def _picture(figure: Figure, description: str) -> tuple[str, str]:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode(), description
