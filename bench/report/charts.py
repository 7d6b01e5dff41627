"""A report's other pictures: what memory consists of, and cost against length."""

from __future__ import annotations

from itertools import cycle, pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from palkernels.bench.report.conditions import mode_title, short
from palkernels.bench.report.document import GIB, Row
from palkernels.bench.report.points import ABOVE_STATIC, EAGER_SECONDS, SECONDS, Points, has_eager, value
from palkernels.bench.report.roles import MODES, label, style_of
from palkernels.bench.report.style import PART_COLORS, frame, grid, plain

__all__ = ["draw_lengths", "draw_memory"]

MOST_COUNTS = 4  # panels that fit side by side
# The cost in a line of panels -> its title and unit, and the factor from a row's figure to the unit.
QUANTITIES = {
    SECONDS: ("time", "ms", 1e3),
    EAGER_SECONDS: ("time, eager", "ms", 1e3),
    ABOVE_STATIC: ("peak memory above the static part", "GiB", 1.0),
    "attention_flops": ("FLOPs of attention", "TFLOP", 1e-12),
}


def draw_memory(meta: dict[str, Any], points: Points) -> Figure:
    """Draw what memory consists of at its peak: a bar for each method, a panel for each of at most four numbers of
    audio tokens."""
    rows = [row for row in points.rows if row.get("memory_breakdown") and row.get("device") == points.devices[0]]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    counts = points.counts()
    if len(counts) > MOST_COUNTS:
        counts = [counts[round(index)] for index in np.linspace(0, len(counts) - 1, MOST_COUNTS)]
    methods = {mode: [x for x in points.methods(mode) if any(x == row["method"] for row in rows)] for mode in modes}
    bars = [len(methods[mode]) for mode in modes]
    size = (3.7 * len(counts) + 1.6, 0.33 * sum(bars) + 1.1 * len(bars) + 1.6)
    figure, axes = grid(len(modes), len(counts), size, gridspec_kw={"height_ratios": bars})
    for line, mode in zip(axes, modes, strict=True):
        for ax, count in zip(line, counts, strict=True):
            here = {row["method"]: row for row in rows if (row["mode"], row["audio_tokens"]) == (mode, count)}
            longest = max((row["peak_memory_bytes"] / GIB for row in here.values()), default=1.0)
            for place, method in enumerate(methods[mode]):
                start = 0.0
                for part, color in PART_COLORS.items():
                    width = here[method]["memory_breakdown"].get(part, 0) / GIB if method in here else 0.0
                    ax.barh(place, width, left=start, color=color, height=0.72)
                    start += width
                ax.text(start + 0.015 * longest, place, f"{start:.1f}" if start else "", va="center", fontsize=9)
            ax.set_xlim(0, 1.17 * longest)
            names = [label(method) for method in methods[mode]] if ax is line[0] else []
            ax.set_yticks(range(len(methods[mode])), names or [""] * len(methods[mode]))
            ax.invert_yaxis()
            ax.tick_params(axis="y", length=0)
            ax.set_title(f"{mode_title(mode)}, {count:,} audio tokens", fontsize=10)
            ax.set_xlabel("GiB", fontsize=9)
            plain(ax, "x")
    used = [part for part in PART_COLORS if any(part in row["memory_breakdown"] for row in rows)]
    handles = [Patch(color=PART_COLORS[part], label=part) for part in used]
    height = 0.78 / figure.get_figheight()
    figure.legend(handles=handles, loc="lower center", ncols=8, frameon=False, bbox_to_anchor=(0.5, height))
    frame(figure, meta, above=0.75, below=1.65, left=1.55 / size[0], right=0.99, hspace=0.42, wspace=0.1)
    return figure


def draw_lengths(document: dict[str, Any], mode: str) -> Figure:
    """Draw the costs of a mode ("train" or "prefill") as a length varies: a column of panels for each length."""
    rows = [row for row in document["lengths"] if row["mode"] == mode]
    lengths = list(dict.fromkeys(row["varies"] for row in rows))
    quantities = {key: about for key, about in QUANTITIES.items() if key != EAGER_SECONDS or has_eager(rows)}
    figure, axes = grid(len(quantities), len(lengths), (5.1 * len(lengths), 4.0 * len(quantities)))
    keys = ("mode", "varies", "method", "device", "quantity")
    fits = {tuple(fit[key] for key in keys): fit["exponent"] for fit in document.get("exponents", [])}
    devices = list(dict.fromkeys(row["device"] for row in rows))
    for line, (quantity, (name, unit, scale)) in zip(axes, quantities.items(), strict=True):
        shown = devices if quantity in (SECONDS, EAGER_SECONDS) else devices[:1]  # the others are the same on every GPU
        for ax, varies in zip(line, lengths, strict=True):
            varied = [row for row in rows if row["varies"] == varies]
            for method in dict.fromkeys(row["method"] for row in varied):
                for device, dashes in zip(shown, cycle(("-", "--", ":", "-."))):
                    line_rows = [row for row in varied if (row["method"], row["device"]) == (method, device)]
                    line_rows.sort(key=lambda row: int(row[varies]))
                    fit = fits.get((mode, varies, method, device, quantity))
                    text = label(method) + (f", {short(device)}" if len(shown) > 1 else "")
                    text += "" if fit is None else f": p = {fit:.2f}"
                    style = style_of(method)
                    look = {"color": style.color, "marker": style.marker, "ms": 5, "ls": dashes, "label": text}
                    costs = [scale * _cost(row, quantity) for row in line_rows]
                    ax.plot([row[varies] for row in line_rows], costs, **look)
            counts = sorted({row[varies] for row in varied})
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            close = [after < 1.5 * count for count, after in pairwise(counts)]  # no room for both of their labels
            ax.set_xticks(counts, ["" if near else f"{x:,}" for x, near in zip(counts, [*close, False], strict=True)])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
            ax.legend(loc="upper left", fontsize=9, frameon=False)
            ax.set_title(f"{mode_title(mode)}: {name}", fontsize=11)
            ax.set_xlabel(varies.replace("_", " "))
            ax.set_ylabel(unit)
            plain(ax, "both")
    notes = f"{_held(rows, lengths)}. p: beyond the shortest length, a cost grows like length to the power of p"
    frame(figure, document["meta"], notes=notes, above=0.85, below=1.6, left=0.06, right=0.985, hspace=0.42, wspace=0.2)
    return figure


def _cost(row: Row, quantity: str) -> float:
    return float(row[quantity] if quantity == "attention_flops" else value(row, quantity) or 0.0)


def _held(rows: list[Row], lengths: list[str]) -> str:
    """Return the value at which each length stays while another varies."""
    values = []
    for held in lengths:
        counts = {row[held] for row in rows if row["varies"] != held}
        values.append(f"{held.replace('_', ' ')} {', '.join(f'{count:,}' for count in sorted(counts))}")
    return f"while another varies: {', '.join(values)}"
