"""The tables that tell what a study found."""

from __future__ import annotations

from typing import Any

from palkernels.bench.report.table import Column, Table, number
from palkernels.bench.study.contestants import CONTESTANTS
from palkernels.bench.study.document import Figure, final, methods_of, points, seeds_of

__all__ = ["accuracy", "cost", "method_label"]

BASE = "plits"  # what costs are compared with


def method_label(name: str) -> str:
    """Return what tables call a method; one that this version does not have keeps its name."""
    return CONTESTANTS[name].label if name in CONTESTANTS else name


def accuracy(study: dict[str, Any]) -> Table:
    """Accuracy of each method at the end, by task: in percent, mean and standard deviation over seeds."""
    tasks = study["meta"]["settings"]["tasks"]
    columns = [Column("method", text=True), Column("seeds"), Column("all tasks"), *(Column(task) for task in tasks)]
    table = Table("Accuracy at the end, in percent, over seeds", columns)
    for method in methods_of(study):
        found = final(study, method)
        cells = [_percent(found[name]) for name in ("", *tasks)]
        table.rows.append([method_label(method), str(len(seeds_of(study, method))), *cells])
    chances = [_chance(study, task) for task in tasks]
    table.rows.append(["chance", "", "", *("" if share is None else f"{100 * share:.0f}" for share in chances)])
    return table


def cost(study: dict[str, Any]) -> Table:
    """What learning took: seconds of the processor for a sample, in each stage, and how accurate a run is by then."""
    columns = [
        Column("method", text=True),
        Column("connector alone", "CPU s a sample"),
        Column("both", "CPU s a sample"),
    ]
    columns += [Column("CPU s", "in all"), Column(f"of {method_label(BASE)}'s", "in all")]
    table = Table("What it took, over seeds", columns)
    whole = {method: points(study, method)[-1]["cpu_seconds"].mean for method in methods_of(study)}
    for method in methods_of(study):
        stages = _by_stage(study, method)
        share = f"{whole[method] / whole[BASE]:.2f}" if BASE in whole else ""
        table.rows.append([method_label(method), *(number(x) for x in stages), number(whole[method]), share])
    return table


def _by_stage(study: dict[str, Any], method: str) -> list[float | None]:
    """Return the seconds of the processor for a sample of each stage, the mean over seeds."""
    settings = study["meta"]["settings"]
    align, joint = [], []
    for run in study["runs"]:
        if run["method"] == method:
            before = [point["cpu_seconds"] for point in run["points"] if point["stage"] == "align"][-1]
            align.append(before / settings["align"])
            joint.append(run["points"][-1]["cpu_seconds"] - before)
    both = Figure.of(joint).mean / settings["joint"] if settings["joint"] else None
    return [Figure.of(align).mean, both]


def _percent(figure: Figure) -> str:
    mean = f"{100 * figure.mean:.0f}"
    return mean if figure.spread is None else f"{mean} ± {100 * figure.spread:.0f}"


def _chance(study: dict[str, Any], task: str) -> float | None:
    """Return the share of right answers by guessing; None for an open question."""
    count = study["meta"]["sounds"]["choices"].get(task, 0)
    return 1 / count if count else None
