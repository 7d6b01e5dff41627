"""The figures of a result document, and by how much methods differ in them: the only place that computes gains.

A gain is a change relative to another method at the same point: -0.6 is 60 % less memory, 1.5 is 2.5 times the
throughput.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from palkernels.bench.report.document import ERRORS, GIB, POINT, Row
from palkernels.bench.report.roles import BASELINE, OURS, chain, in_order

__all__ = [
    "ABOVE_STATIC", "EAGER_RATE", "EAGER_SECONDS", "MEMORY", "PUBLISHED", "RATE", "RATES", "SECONDS", "Points",
    "Published", "Step", "add_errors", "has_eager", "relative", "value", "waterfall",
]  # fmt: skip

MEMORY, ABOVE_STATIC, RATE = "peak_memory_bytes", "peak_above_static_bytes", "samples_per_second"
SECONDS = "seconds"  # of a whole batch; follows from RATE
# What a simulation predicts for eager mode; its RATE is that of captured graphs.
EAGER_RATE, EAGER_SECONDS = "eager_samples_per_second", "eager_seconds"
RATES = (RATE, EAGER_RATE)


@dataclass(frozen=True)
class Published:
    """A gain over PLITS that others published: as a change, and in words."""

    change: float
    text: str


# "PAL: Probing Audio Encoders via LLMs", arXiv 2506.10423: the largest gains of version 2, with the whole LLM, and what
# the abstract of version 3 says. The third is not in the abstracts.
PUBLISHED = {
    ("train", MEMORY): Published(-0.641, "-64.1 % (v2), about -60 % (v3)"),
    **dict.fromkeys((("train", RATE), ("train", EAGER_RATE)), Published(2.475, "+247.5 % (v2), about +190 % (v3)")),
    ("infer", MEMORY): Published(-0.83, "-83 % (as others report it)"),
}


class Points:
    """Rows with the same number of text tokens, looked up by mode, method, number of audio tokens and device.

    Where a method takes a device, None is the first one. Memory is the same on all of them.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.devices: list[str | None] = list(dict.fromkeys(row.get("device") for row in self.rows))
        self.rates = RATES if has_eager(self.rows) else RATES[:1]
        self._index = {(row["mode"], row["method"], row["audio_tokens"], row.get("device")): row for row in self.rows}

    @classmethod
    def by_text_tokens(cls, rows: Iterable[Row]) -> dict[int, Points]:
        """Sort rows by their number of text tokens."""
        by_count: dict[int, list[Row]] = {}
        for row in rows:
            by_count.setdefault(row["text_tokens"], []).append(row)
        return {count: cls(same) for count, same in by_count.items()}

    def methods(self, mode: str | None = None) -> list[str]:
        """Return the methods of a mode, or of all modes, in the usual order."""
        return in_order(row["method"] for row in self.rows if mode in (None, row["mode"]))

    def counts(self, mode: str | None = None) -> list[int]:
        """Return the numbers of audio tokens of a mode, or of all modes."""
        return sorted({row["audio_tokens"] for row in self.rows if mode in (None, row["mode"])})

    def row(self, mode: str, method: str, audio: int, device: str | None = None) -> Row | None:
        return self._index.get((mode, method, audio, self.devices[0] if device is None else device))

    def value(self, key: str, mode: str, method: str, audio: int, device: str | None = None) -> float | None:
        """Return a figure in the unit of `value`; None where the method was not tried or did not run."""
        row = self.row(mode, method, audio, device)
        return None if row is None else value(row, key)

    def change(
        self, key: str, mode: str, method: str, base: str, audio: int, device: str | None = None
    ) -> float | None:
        """Return how much a figure differs from the method `base`'s, relative to it; None for `base` itself and where
        one of the two has no figure."""
        if method == base:
            return None
        ours, theirs = (self.value(key, mode, name, audio, device) for name in (method, base))
        return relative(ours, theirs)


def value(row: Row, key: str) -> float | None:
    """Return a row's figure: GiB of memory, samples per second, or seconds a batch; None where it did not run."""
    if row["status"] != "ok":
        return None
    if key in (*RATES, SECONDS, EAGER_SECONDS):
        rate = row[RATE]["p50"] if key in (RATE, SECONDS) else _eager_rate(row)
        return rate if rate is None or key in RATES else row["batch_size"] / rate if rate else None
    return float(row[key]) / GIB


def has_eager(rows: Iterable[Row]) -> bool:
    """Return whether rows of a simulation tell eager mode from captured graphs."""
    return any(EAGER_RATE in row for row in rows)


def _eager_rate(row: Row) -> float | None:
    """Return a rate in eager mode: what was measured ran in it."""
    rate: float | None = row[RATE]["p50"] if row.get("source") == "measured" else row.get(EAGER_RATE)
    return rate


def relative(figure: float | None, base: float | None) -> float | None:
    """Return figure / base - 1, or None if one is missing or the base is 0."""
    return None if figure is None or not base else figure / base - 1


def add_errors(rows: Iterable[Row], measured: dict[str, Any]) -> int:
    """Add the prediction's error to each simulated row whose point was measured on the same device.

    An error of 0.05 is a prediction that is 5 % too high. The time of captured graphs is a lower bound, so their
    throughput is predicted too high; what was measured ran in eager mode. Returns how many rows got an error.
    """
    device = measured["meta"].get("device_name")
    references = {tuple(row[key] for key in POINT): row for row in measured["rows"] if row["status"] == "ok"}
    count = 0
    for row in rows:
        reference = references.get(tuple(row[key] for key in POINT))
        if row["device"] == device and reference is not None:
            row[ERRORS] = {key: relative(value(row, key), value(reference, key)) for key in (MEMORY, RATE)}
            if EAGER_RATE in row:
                row[ERRORS][EAGER_RATE] = relative(row[EAGER_RATE], value(reference, RATE))
            count += 1
    return count


@dataclass(frozen=True)
class Step:
    """What a figure falls by from one method to the next, also as a share of the whole fall."""

    start: str
    end: str
    what: str
    saved: float | None
    share: float | None


def waterfall(values: Mapping[str, float | None]) -> list[Step]:
    """Split the way from PLITS to LAL into steps, one for each method between them that `values` has.

    A step over a missing method is both steps. There are none if PLITS or LAL is missing.
    """
    texts = chain()
    names = list(texts)
    present = [name for name in names if name in values]
    if len(present) < 2 or present[0] != BASELINE or present[-1] != OURS:
        return []
    first, last = values[BASELINE], values[OURS]
    whole = None if first is None or last is None else first - last
    steps = []
    for start, end in pairwise(present):
        before, after = values[start], values[end]
        saved = None if before is None or after is None else before - after
        what = "; ".join(texts[name] for name in names[names.index(start) + 1 : names.index(end) + 1])
        steps.append(Step(start, end, what, saved, saved / whole if saved is not None and whole else None))
    return steps
