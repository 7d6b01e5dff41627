"""How costs grow with length: exponents fitted to a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import pairwise

from palkernels.bench.report.document import Row

__all__ = ["exponents"]

MOST_CURVATURE = 0.25  # by which the exponents between neighbouring lengths may differ
COSTS: dict[str, Callable[[Row], float]] = {
    "seconds": lambda row: row["batch_size"] / row["samples_per_second"]["p50"],
    "peak_above_static_bytes": lambda row: row["peak_above_static_bytes"],
    "attention_flops": lambda row: row["attention_flops"],
}


def exponents(rows: list[Row]) -> list[Row]:
    """Return p in growth ~ length ** p, for each varying length, mode, method, device and cost of a sweep.

    Growth is a cost beyond its value at the shortest length, and lengths are counted from the shortest too, so that
    constant parts drop out. The slope is fitted in logarithms to the three longest lengths. p is None where a cost does
    not grow, or grows by no one power (another part of the run may become the peak).
    """
    sweeps: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        sweeps.setdefault((row["varies"], row["mode"], row["method"], row["device"]), []).append(row)
    fits = []
    for (varies, mode, method, device), sweep in sweeps.items():
        sweep.sort(key=lambda row: int(row[varies]))
        for name, cost in COSTS.items():
            about = {"varies": varies, "mode": mode, "method": method, "device": device}
            exponent = _exponent([(row[varies], cost(row)) for row in sweep])
            fits.append({**about, "quantity": name, "exponent": exponent})
    return fits


def _exponent(points: list[tuple[float, float]]) -> float | None:
    """Fit one exponent to (length, cost) pairs, shortest first."""
    shortest, *longer = points
    growth = [(n - shortest[0], y - shortest[1]) for n, y in longer[-3:]]
    if len(growth) < 2 or any(y <= 0 for _, y in growth):
        return None
    logs = [(math.log(n), math.log(y)) for n, y in growth]
    slopes = [(y2 - y1) / (n2 - n1) for (n1, y1), (n2, y2) in pairwise(logs)]
    if max(slopes) - min(slopes) > MOST_CURVATURE:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope
