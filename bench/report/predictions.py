"""Tables that hold a simulation against what was measured on the same GPU: one row for each method of Figure 1."""

from __future__ import annotations

from palkernels.bench.report.document import GIB
from palkernels.bench.report.points import EAGER_RATE, MEMORY, RATE, Points
from palkernels.bench.report.roles import LEVERS, MODES, label
from palkernels.bench.report.table import Column, Table, change, gib, number

__all__ = ["memory", "throughput"]

GROUPS = ("training", "inference")  # the modes' names in headings


def memory(real: Points, simulated: Points, count: int, gpu: str) -> Table:
    """The simulated peak of memory beside the measured one."""
    table = _table(("GiB simulated", "GiB measured", "off by"))
    for method in _methods(real):
        cells = [label(method)]
        for mode in MODES:
            size = simulated.value(MEMORY, mode, method, count, gpu)
            row = simulated.row(mode, method, count, gpu)
            # The simulation has no optimizer: AdamW keeps two moments for each parameter.
            if size is not None and row is not None and mode == "train":
                size += 2 * row["memory_breakdown"]["parameters"] / GIB
            peak = real.value(MEMORY, mode, method, count)
            cells += [gib(size), gib(peak), change(peak / size - 1) if size and peak is not None else ""]
        table.rows.append(cells)
    return table


def throughput(real: Points, simulated: Points, count: int, gpu: str) -> Table:
    """Launches of a step or a generation, those of ours among them; samples per second as predicted for captured graphs
    and for eager mode, beside what eager mode reached."""
    table = _table(("kernels", "ours", "captured", "eager", "measured", "measured / eager"))
    for method in _methods(real):
        cells = [label(method)]
        for mode in MODES:
            captured, eager = (simulated.value(key, mode, method, count, gpu) for key in (RATE, EAGER_RATE))
            rate, row = real.value(RATE, mode, method, count), simulated.row(mode, method, count, gpu) or {}
            cells += [f"{row[key]:,.0f}" if key in row else "" for key in ("kernels", "our_kernels")]
            cells += map(number, (captured, eager, rate))
            cells.append(f"{rate / eager:.2f}" if rate is not None and eager else "")
        table.rows.append(cells)
    return table


def _table(headings: tuple[str, ...]) -> Table:
    return Table("", [Column("", text=True), *(Column(heading, group) for group in GROUPS for heading in headings)])


def _methods(points: Points) -> list[str]:
    return [method for method in points.methods("train") if method not in LEVERS]
