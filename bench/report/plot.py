"""The picture of Figure 1, drawn from the content of figure1.json or simulate.json alone.

`python -m palkernels.bench.report.plot RESULTS.json PICTURE.png` draws it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.report.conditions import short, sizes
from palkernels.bench.report.document import Row, read, write_all
from palkernels.bench.report.points import ABOVE_STATIC, EAGER_RATE, MEMORY, PUBLISHED, RATE, RATES, Points, value
from palkernels.bench.report.roles import BASELINE, BASELINES, LEVERS, MODES, OURS, label, style_of
from palkernels.bench.report.style import frame, grid, plain
from palkernels.bench.report.tables import gains, launched

__all__ = ["described", "digest", "draw", "render"]

PAPER_COLOR = "#8a8a8a"
PAPER = (
    "PLITS with the paper's largest gains applied: -64.1 % memory, +247.5 % throughput in training "
    "(arXiv 2506.10423 v2, full-depth LLM; v3: about -60 %, +190 %)"
)
# A panel's figure -> its title and the unit on its axis.
PANELS = {
    MEMORY: ("peak memory", "GiB"),
    ABOVE_STATIC: ("peak memory above the static part", "GiB"),
    RATE: ("throughput", "samples per second"),
    EAGER_RATE: ("throughput", "samples per second"),
}


def render(document: dict[str, Any]) -> bytes:
    """Return the PNG of a result document; its description holds the document's `digest`."""
    png = io.BytesIO()
    draw(document).savefig(png, format="png", metadata=described(document))
    return png.getvalue()


def described(document: dict[str, Any]) -> dict[str, str]:
    """Return the metadata by which a picture tells what results it shows."""
    return {"Description": f"results {digest(document)}"}


def digest(document: dict[str, Any]) -> str:
    """Return a hash of the results, which does not depend on how their file is laid out."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def draw(document: dict[str, Any]) -> Figure:
    """Draw a result document. With several GPUs the picture shows memory once and the throughput of each; with several
    numbers of text tokens, the first of them."""
    meta = document["meta"]
    points = Points(row for row in document["rows"] if row["text_tokens"] == meta["text_tokens"])
    methods = [method for method in points.methods() if method not in LEVERS] or points.methods()
    devices = points.devices or [None]
    panels = [(MEMORY, devices[0]), (ABOVE_STATIC, devices[0])]
    panels += [(key, device) for device in devices for key in points.rates]
    if len(devices) > 1:
        del panels[1]
    figure, axes = grid(len(MODES), len(panels), (5.1 * len(panels), 9.7))
    for line, mode in zip(axes, MODES, strict=True):
        for ax, (key, device) in zip(line, panels, strict=True):
            _panel(ax, points, methods, mode, key, device)
        line[0].annotate(
            sizes(meta, mode),
            (0, 1),
            (-50, 28),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=12,
            fontweight="bold",
        )
    handles = [_handle(method) for method in methods]
    paper = Line2D([], [], color=PAPER_COLOR, ls=":", marker="_", ms=10, label=PAPER)
    for entries, inches in ((handles, 1.0), ([paper], 0.74)):  # the paper's entry takes a line of its own
        height = inches / figure.get_figheight()
        figure.legend(handles=entries, loc="lower center", ncols=8, frameon=False, bbox_to_anchor=(0.5, height))
    frame(figure, meta, above=1.15, below=2.2, left=0.07, right=0.985, hspace=0.68, wspace=0.24)
    return figure


def _handle(method: str) -> Line2D:
    style = style_of(method)
    return Line2D([], [], color=style.color, marker=style.marker, lw=2, label=label(method))


def _panel(ax: Axes, points: Points, methods: list[str], mode: str, key: str, device: str | None) -> None:
    """Draw one figure of one mode: a line for each method, and under the axis what LAL gains."""
    counts = points.counts(mode)
    place = {count: float(index) for index, count in enumerate(counts)}  # evenly spaced, so that figures have room
    rows = [
        row for row in points.rows if row["mode"] == mode and row.get("device") == device and row["method"] in methods
    ]
    values = [(row, x) for row in rows if (x := value(row, key)) is not None]
    paper = _paper_levels(values, mode, key)
    failed = [row for row in rows if row["status"] != "ok"]
    most = max((sum(row["audio_tokens"] == count for row in failed) for count in counts), default=0)
    samples = [sample for row, _ in values for sample in row[RATE]["samples"]] if key == RATE else []
    top = max([*(x for _, x in values), *paper.values(), *samples], default=1.0)
    ax.set_ylim(0, top * (1.06 + 0.09 * most))
    ax.set_xlim(-0.45, max(len(counts), 1) - 0.55)
    ax.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    heading, unit = PANELS[key]
    if key in RATES:
        heading = launched(heading + (f" on {short(device)}" if device else ""), None, key, points.rates)
    ax.set_title(heading, fontsize=11)
    ax.set_ylabel(unit)
    plain(ax, "y")
    ax.tick_params(axis="x", length=0)
    xs = [place[count] for count in paper]
    ax.plot(xs, list(paper.values()), color=PAPER_COLOR, lw=1.5, ls=":", marker="_", ms=14)
    for method in methods:
        style = style_of(method)
        drawn = [(place[row["audio_tokens"]], x, row) for row, x in values if row["method"] == method]
        if key == RATE:
            for x, _, row in drawn:
                ends = [min(row[RATE]["samples"]), max(row[RATE]["samples"])]
                ax.plot([x, x], ends, color=style.color, lw=5, alpha=0.25, solid_capstyle="butt")
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "lw": 2, "ls": style.line}
        look |= {"ms": 7 if style.line == "-" else 5, "zorder": 4 if method == OURS else 3}
        ax.plot([x for x, _, _ in drawn], [y for _, y, _ in drawn], **look)
    for count, x in place.items():
        for index, row in enumerate(row for row in failed if row["audio_tokens"] == count):
            text = row["status"] if len(counts) < 5 else row["status"].replace(" ", "\n")
            _write(ax, text, (x, 0.97 - 0.075 * index), color=style_of(row["method"]).color, va="top")
    _write_gains(ax, points, place, mode, key, device)


def _write_gains(ax: Axes, points: Points, place: dict[int, float], mode: str, key: str, device: str | None) -> None:
    """Write the table of LAL's gains under the axis, its columns under the ticks."""
    line = 0
    for base, (name, *cells) in zip(BASELINES, gains(points, mode, key, device).rows, strict=True):
        if not any(cells):
            continue
        color, height = style_of(base).color, -0.155 - 0.08 * line
        _write(ax, f"{name} ", (-0.5, height), color=color, ha="right", fontsize=8)
        for x, text in zip(place.values(), cells, strict=True):
            _write(ax, text, (x, height), color=color, fontweight="bold")
        line += 1
    ax.set_xlabel("audio tokens", labelpad=4 + 15.5 * line)


def _write(ax: Axes, text: str, at: tuple[float, float], **how: Any) -> None:
    how = {"ha": "center", "va": "center", "fontsize": 9.5, **how}
    ax.text(*at, text, transform=ax.get_xaxis_transform(), clip_on=False, **how)


def _paper_levels(values: list[tuple[Row, float]], mode: str, key: str) -> dict[int, float]:
    """Return, by audio tokens, the figure of a method with the paper's largest gain over our baseline. The paper does
    not set a static part apart, so its gain is held against the whole peak."""
    published = PUBLISHED.get((mode, key))
    if published is None or mode != "train":
        return {}
    return {row["audio_tokens"]: (1 + published.change) * x for row, x in values if row["method"] == BASELINE}


def main(arguments: list[str]) -> int:
    """Draw the results in one file into another: `RESULTS.json PICTURE.png`. Returns the exit code."""
    if len(arguments) != 2:
        print("error: two paths must be given: RESULTS.json PICTURE.png", file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    try:
        write_all(target.parent, {target.name: render(read(source))})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = "the results of palkernels figure1 or simulate"
        print(f"error: {str(source)!r} must hold {wanted}, got: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
