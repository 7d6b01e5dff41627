"""The table of generation with compiled steps."""

from __future__ import annotations

from palkernels.bench.report.document import Row
from palkernels.bench.report.points import relative
from palkernels.bench.report.roles import BASELINE, against, label
from palkernels.bench.report.table import Column, Table, factor, number

__all__ = ["compiled"]


def compiled(rows: list[Row]) -> Table | None:
    """Generation as it comes, and with a static cache and compiled steps."""
    if not rows:
        return None
    first = rows[0]
    columns = [Column("audio tokens"), Column("method", text=True), Column("eager", "samples/s")]
    columns += [Column("compiled", "samples/s"), Column("compiled / eager"), Column(against(BASELINE), "compiled")]
    columns.append(Column("status", text=True))
    sizes = f"batch {first['batch_size']}, {first['text_tokens']} text tokens, {first['new_tokens']} new tokens"
    table = Table(f"Generation with compiled steps: {sizes}, {first['dtype']}", columns)
    rates = {(x["audio_tokens"], x["method"]): x["compiled_samples_per_second"]["p50"] for x in rows}
    for row in rows:
        eager, rate = (row[key]["p50"] for key in ("samples_per_second", "compiled_samples_per_second"))
        base = None if row["method"] == BASELINE else rates.get((row["audio_tokens"], BASELINE))
        cells = [f"{row['audio_tokens']:,}", label(row["method"]), number(eager), number(rate)]
        table.rows.append([*cells, factor(relative(rate, eager)), factor(relative(rate, base)), row["status"]])
    return table
