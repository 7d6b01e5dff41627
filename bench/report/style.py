"""How pictures look: a colour and a marker for every method, and what stands on every picture."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from palkernels.bench.report.conditions import caption, title

__all__ = ["METHOD_STYLES", "PART_COLORS", "frame", "grid", "plain", "style", "svg"]

# Warm where audio is in the sequence, cold where it is keys and values.
METHOD_STYLES = {
    "plits": ("#c0392b", "s"),
    "plits-tuned": ("#e08e2b", "D"),
    "plits-pooled": ("#8d6e63", "v"),
    "lal-eager": ("#5bb5c9", "^"),
    "lal": ("#1f5fae", "o"),
    "pal-multi": ("#b8a03a", "<"),
    "pal-unified": ("#274690", ">"),
    "flamingo": ("#d67bb0", "*"),
    "lal-recompute": ("#3a9d5d", "P"),
    "lal-checkpoint": ("#7b5ea7", "X"),
    "lal-fused-loss": ("#c76ba0", "p"),
}
OTHER_STYLE = ("#555555", "h")
# Grey for what every method has, in colour what methods differ in.
PART_COLORS = {
    "parameters": "#d3d7dd",
    "gradients": "#a9b2bf",
    "optimizer": "#7f8a99",
    "activations": "#1f5fae",
    "logits": "#e08e2b",
    "K/V cache": "#3a9d5d",
    "temporaries": "#b07aa1",
}
TEXT_COLOR, GRID_COLOR = "#444444", "#e6e6e6"


def style(method: str) -> tuple[str, str]:
    """Colour and marker."""
    return METHOD_STYLES.get(method, OTHER_STYLE)


def grid(lines: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False, **shared)


def plain(ax: Axes, axis: Any) -> None:
    """Light lines across the values alone."""
    ax.grid(axis=axis, color=GRID_COLOR)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def frame(
    figure: Figure, meta: dict[str, Any], *, notes: str = "", above: float, below: float, **spaces: float
) -> None:
    """The run's conditions above and below the panels, which leave `above` and `below` inches for them."""
    height = figure.get_figheight()
    figure.suptitle(title(meta), fontsize=14, fontweight="bold", y=1 - 0.14 / height, va="top")
    text = "\n".join(filter(None, (notes, caption(meta))))
    place: dict[str, Any] = {"ha": "center", "va": "bottom", "linespacing": 1.35}
    figure.text(0.5, 0.1 / height, text, fontsize=8.5, color=TEXT_COLOR, **place)
    figure.subplots_adjust(top=1 - above / height, bottom=below / height, **spaces)


def svg(figure: Figure) -> bytes:
    """Alike for figures that are."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "palkernels"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
