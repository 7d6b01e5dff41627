"""The picture of a study: accuracy against samples, and against seconds of the processor."""

from __future__ import annotations

import io
from typing import Any

from palkernels.bench.report.plot import described
from palkernels.bench.report.roles import UNKNOWN
from palkernels.bench.report.style import GRID_COLOR, TEXT_COLOR, grid, plain
from palkernels.bench.study.contestants import CONTESTANTS
from palkernels.bench.study.document import methods_of, points, seeds_of
from palkernels.bench.study.tables import method_label

__all__ = ["render"]

AXES = (("samples", "training samples"), ("cpu_seconds", "CPU seconds of training"))


def _counted(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def render(study: dict[str, Any]) -> bytes:
    """Return the picture as PNG: a line a method, the mean over seeds, in a band of one standard deviation."""
    figure, axes = grid(1, 2, (11.5, 5.2), sharey=True)
    settings = study["meta"]["settings"]
    for ax, (name, title) in zip(axes[0], AXES, strict=True):
        for method in methods_of(study):
            style = CONTESTANTS[method].style if method in CONTESTANTS else UNKNOWN
            found = points(study, method)
            x = [point[name].mean for point in found]
            y = [100 * point["accuracy"].mean for point in found]
            spread = [100 * (point["accuracy"].spread or 0.0) for point in found]
            ax.plot(x, y, color=style.color, marker=style.marker, linestyle=style.line, label=method_label(method))
            low, high = ([m + sign * s for m, s in zip(y, spread, strict=True)] for sign in (-1, 1))
            ax.fill_between(x, low, high, color=style.color, alpha=0.12, linewidth=0)
        plain(ax, "both")
        ax.set_xlabel(title)
        ax.set_xlim(left=0)
        ax.set_ylim(0, 100)
    axes[0][0].axvline(settings["align"], color=GRID_COLOR, linewidth=2, zorder=0)
    axes[0][0].annotate(
        "the language model learns, too", (settings["align"], 2), xytext=(4, 0), textcoords="offset points",
        fontsize=8.5, color=TEXT_COLOR,
    )  # fmt: skip
    axes[0][0].set_ylabel("right answers, % (unheard voices and sounds)")
    axes[0][0].legend(frameon=False, loc="upper left")
    seeds = max(len(seeds_of(study, method)) for method in methods_of(study))
    title = f"SmolLM2-135M hears through Whisper tiny.en: {len(settings['tasks'])} tasks at once, {_counted(seeds)}"
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.text(0.5, 0.01, study["meta"]["cpu"] + ", one thread a run", ha="center", fontsize=8.5, color=TEXT_COLOR)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.9, bottom=0.15, wspace=0.06)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None, **described(study)})
    return out.getvalue()
