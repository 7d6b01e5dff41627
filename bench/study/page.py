"""A study's figures as a page shows them."""

from __future__ import annotations

from typing import Any

from palkernels.bench.report.markdown import to_markdown
from palkernels.bench.study import tables

__all__ = ["page"]


def page(study: dict[str, Any]) -> str:
    """Return the conditions of a study, what each method has learnt at the end, by task, and what it took."""
    meta = study["meta"]
    settings, sounds = meta["settings"], meta["sounds"]
    seeds = ", ".join(map(str, sorted({run["seed"] for run in study["runs"]})))
    after = f", then {settings['joint']:,} of the language model, too" if settings["joint"] else ""
    conditions = (
        f"{len(settings['tasks'])} tasks at once, {settings['train']} questions of each to learn from and "
        f"{settings['test']} about unheard clips, {sounds['clips']:,} clips of {sounds['seconds'] / 60:.0f} minutes "
        f"together; {settings['align']:,} samples of the connector alone{after}, {settings['batch']} a step; seeds "
        f"{seeds}; one thread a run, {meta['jobs']} runs at a time, on {meta['cpu']}, {meta['date'][:10]}."
    )
    parts = [conditions]
    for table in (tables.accuracy(study), tables.cost(study)):
        parts.append(f"{table.title}:\n\n{to_markdown(table)}")
    return "\n\n".join(parts)
