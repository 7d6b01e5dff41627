"""The picture of Figure 1, drawn from the content of figure1.json alone.

`python -m palkernels.bench.plot figure1.json figure1.png` draws it again.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.methods import MODES
from palkernels.bench.results import BASELINE, GIB, Row, baseline_of, percent, reduction, speed_up, write_all

__all__ = ["draw", "render"]

# The abstract of version 2 of the paper: the largest gains it measured, with the whole LLM. Version 3 says
# about -60 % and +190 %.
PAPER_MEMORY = 1 - 0.641
PAPER_THROUGHPUT = 1 + 2.475
PAPER = (
    "PLITS with the paper's largest gains applied: -64.1 % memory, +247.5 % throughput "
    "(arXiv 2506.10423 v2, full-depth LLM; v3: about -60 %, +190 %)"
)

STYLES = {"plits": ("#c44e52", "s", "PLITS"), "lal": ("#2a6fbb", "o", "LAL")}
OTHER_STYLES = (("#55a868", "^"), ("#8172b3", "D"), ("#937860", "v"), ("#64b5cd", "P"))
PAPER_COLOR = "#8a8a8a"
TITLES = {"train": "Training step", "infer": "Inference"}
# What a column shows -> its title and the unit on its axis.
METRICS = {
    "peak_memory_bytes": ("peak memory", "GiB"),
    "peak_above_static_bytes": ("peak memory above the static part", "GiB"),
    "samples_per_second": ("throughput", "samples per second"),
}


def render(document: dict[str, Any]) -> bytes:
    """The PNG of a result document (`meta` and `rows`)."""
    png = io.BytesIO()
    draw(document).savefig(png, format="png")
    return png.getvalue()


def draw(document: dict[str, Any]) -> Figure:
    """The picture of a result document."""
    meta, rows = document["meta"], document["rows"]
    figure = Figure(figsize=(15.5, 9.0), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(MODES), len(METRICS))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for line, mode in enumerate(MODES):
        mine = [row for row in rows if row["mode"] == mode]
        for column, (metric, (title, unit)) in enumerate(METRICS.items()):
            ax = axes[line][column]
            _panel(ax, mine, methods, metric)
            ax.set_title(title, fontsize=11)
            ax.set_ylabel(unit)
        axes[line][0].annotate(
            _shape(meta, mode),
            (0, 1),
            (-48, 26),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=11.5,
            fontweight="bold",
        )
    figure.suptitle(_title(meta), fontsize=14, fontweight="bold", y=0.985)
    handles = _legend(methods)
    for entries, height in ((handles[:-1], 0.085), (handles[-1:], 0.06)):  # the paper's takes a line of its own
        figure.legend(
            handles=entries,
            loc="lower center",
            ncols=len(entries),
            frameon=False,
            fontsize=10,
            bbox_to_anchor=(0.5, height),
        )
    figure.text(0.5, 0.012, _caption(meta), ha="center", va="bottom", fontsize=8.5, color="#444444", linespacing=1.35)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.875, bottom=0.18, hspace=0.48, wspace=0.17)
    return figure


def _value(row: Row, metric: str) -> float:
    """What a panel of `metric` shows of a row."""
    return float(row[metric]["p50"] if metric == "samples_per_second" else row[metric] / GIB)


def _panel(ax: Axes, rows: list[Row], methods: list[str], metric: str) -> None:
    """One metric of one mode: a line per method, and what each point gains over the baseline."""
    counts = sorted({row["audio_tokens"] for row in rows})
    place = {count: float(index) for index, count in enumerate(counts)}  # evenly spaced, so that labels have room
    good = [row for row in rows if row["status"] == "ok"]
    paper = _paper_levels(good, metric)
    top = 1.25 * max([_value(row, metric) for row in good] + list(paper.values()), default=1.0)
    ax.set_ylim(0, top)
    ticks = [tick for tick in ax.get_yticks() if tick <= top]
    # What is written under the lowest points needs room below zero.
    ax.set_ylim(-0.16 * top if metric == "peak_above_static_bytes" else 0, top)
    ax.set_yticks(ticks)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xlim(-0.45, max(len(counts), 1) - 0.55)
    ax.set_xticks(range(len(counts)), [str(count) for count in counts])
    ax.set_xlabel("audio tokens")
    ax.grid(axis="y", color="#e6e6e6")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(axis="x", length=0)

    xs = [place[count] for count in paper]
    ax.plot(xs, list(paper.values()), color=PAPER_COLOR, lw=1.5, ls=":", marker="_", ms=14)
    for method in methods:
        color, marker, _ = _style(method, methods)
        mine = [row for row in good if row["method"] == method]
        xs = [place[row["audio_tokens"]] for row in mine]
        if metric == "samples_per_second":
            for x, row in zip(xs, mine, strict=True):
                samples = row[metric]["samples"]
                ax.plot([x, x], [min(samples), max(samples)], color=color, lw=5, alpha=0.25, solid_capstyle="butt")
        ax.plot(xs, [_value(row, metric) for row in mine], color=color, marker=marker, lw=2, ms=7)
        for row in rows:
            if row["method"] == method:
                _note(ax, row, rows, place[row["audio_tokens"]], metric, color)


def _note(ax: Axes, row: Row, rows: list[Row], x: float, metric: str, color: str) -> None:
    """Write what a point gains over the baseline next to it, or why there is no point."""
    if row["status"] != "ok":
        middle = 0.5 + 0.06 * (1 if row["method"] == BASELINE else -1)  # side by side if both methods fail
        ax.annotate(
            row["status"],
            (x, middle),
            xycoords=("data", "axes fraction"),
            color=color,
            ha="center",
            va="center",
            fontsize=9,
        )
        return
    base = baseline_of(row, rows)
    if metric == "samples_per_second":
        gain = speed_up(row, base)
        text, offset = "" if gain is None else f"{gain:.2f}x", 9
    else:
        text, offset = percent(reduction(row, base, metric)), -17
    if text:
        ax.annotate(
            text,
            (x, _value(row, metric)),
            xytext=(0, offset),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            color=color,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.75},
        )


def _paper_levels(good: list[Row], metric: str) -> dict[int, float]:
    """By audio tokens: where a method with the paper's headline gain over our baseline would lie."""
    # The paper does not set a static part apart, so its figure is held against the whole peak.
    factor = {"peak_memory_bytes": PAPER_MEMORY, "samples_per_second": PAPER_THROUGHPUT}.get(metric)
    if factor is None:
        return {}
    return {row["audio_tokens"]: factor * _value(row, metric) for row in good if row["method"] == BASELINE}


def _legend(methods: list[str]) -> list[Line2D]:
    handles = []
    for method in methods:
        color, marker, label = _style(method, methods)
        handles.append(Line2D([], [], color=color, marker=marker, lw=2, label=label))
    handles.append(Line2D([], [], color=PAPER_COLOR, ls=":", marker="_", ms=10, label=PAPER))
    return handles


def _style(method: str, methods: Sequence[str]) -> tuple[str, str, str]:
    if method in STYLES:
        return STYLES[method]
    others = [name for name in methods if name not in STYLES]
    color, marker = OTHER_STYLES[others.index(method) % len(OTHER_STYLES)]
    return color, marker, method


def _title(meta: dict[str, Any]) -> str:
    depth = f"{meta['layers']} of {meta['full_layers']} layers"
    return f"{meta['model']}, {depth}, {meta['dtype']}, on {meta['device_name']}"


def _shape(meta: dict[str, Any], mode: str) -> str:
    extra = f", {meta['new_tokens']} new tokens" if mode == "infer" else ""
    return f"{TITLES[mode]}: batch {meta[f'{mode}_batch']}, {meta['text_tokens']} text tokens{extra}"


def _caption(meta: dict[str, Any]) -> str:
    versions, repeats = meta["versions"], meta["repeats"]
    parts = (
        f"LLM weights {meta['llm_weights']}; audio encoder {meta['encoder']}, weights {meta['encoder_weights']}, "
        f"outside time and memory; connector {meta['connector']}; {meta['optimizer']}",
        f"static part: weights and, in training, gradients and AdamW states; {meta['device']}, "
        f"{meta['threads']} CPU threads; medians of {repeats['train']} training and "
        f"{repeats['infer']} inference runs (bars: all of them)",
        f"PyTorch {versions['torch']}, "
        f"transformers {versions['transformers']}, palkernels {versions['palkernels']}; {meta['date'][:10]}",
    )
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """`RESULTS.json PICTURE.png`"""
    if len(arguments) != 2:
        print("error: two paths must be given: RESULTS.json PICTURE.png", file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
        write_all(target.parent, {target.name: render(document)})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"error: {str(source)!r} must hold the results of palkernels figure1, got: {one_line(error)}",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
