"""How pictures look: their grid of panels, their frame and the colours of memory's parts."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from palkernels.bench.report.conditions import caption, title
from palkernels.bench.report.document import PARTS

__all__ = ["PART_COLORS", "frame", "grid", "plain", "svg"]

# Grey for what every method has, in colour what methods differ in.
PART_COLORS = dict(
    zip(PARTS, ("#d3d7dd", "#a9b2bf", "#7f8a99", "#1f5fae", "#e08e2b", "#3a9d5d", "#b07aa1"), strict=True)
)
TEXT_COLOR, GRID_COLOR = "#444444", "#e6e6e6"


def grid(lines: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure of `size` inches and its panels, (lines, columns)."""
    figure = Figure(figsize=size, dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False, **shared)


def plain(ax: Axes, axis: Any) -> None:
    """Keep of a panel's decoration light lines across the values (`axis`) and the two axes."""
    ax.grid(axis=axis, color=GRID_COLOR)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def frame(
    figure: Figure, meta: dict[str, Any], *, notes: str = "", above: float, below: float, **spaces: float
) -> None:
    """Write the run's conditions above and below the panels, which leave `above` and `below` inches for them."""
    height = figure.get_figheight()
    # A name may have dollar signs, which are no formula.
    figure.suptitle(title(meta), fontsize=14, fontweight="bold", y=1 - 0.14 / height, va="top", parse_math=False)
    text = "\n".join(filter(None, (notes, caption(meta))))
    place: dict[str, Any] = {"ha": "center", "va": "bottom", "linespacing": 1.35, "parse_math": False}
    figure.text(0.5, 0.1 / height, text, fontsize=8.5, color=TEXT_COLOR, **place)
    figure.subplots_adjust(top=1 - above / height, bottom=below / height, **spaces)


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG; equal figures give equal bytes."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "palkernels"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
