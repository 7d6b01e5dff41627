"""What the points of a result document say of each other, and beside what is published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from palkernels.bench.methods import METHODS
from palkernels.bench.report.document import GIB, Row

__all__ = ["BASELINES", "PUBLISHED", "Points", "Published", "Step", "value", "waterfall"]

BASELINES = ("plits", "plits-tuned")  # what LAL is held against
MEMORY, ABOVE_STATIC, RATE = "peak_memory_bytes", "peak_above_static_bytes", "samples_per_second"
# From the baseline to LAL, and what each step brings.
CHAIN = {
    "plits": "",
    "plits-tuned": "the baseline's logits and attention backend",
    "lal-eager": "the integration: audio as keys and values",
    "lal": "our kernels",
}


@dataclass(frozen=True)
class Published:
    """Gains over PLITS that others give. `change` is that of the figure: -0.641 is 64.1 % less."""

    change: float
    text: str


# "PAL: Probing Audio Encoders via LLMs", arXiv 2506.10423: the largest gains of version 2, with the whole LLM, and what
# the abstract of version 3 says. The third is not in the abstracts.
PUBLISHED = {
    ("train", MEMORY): Published(-0.641, "-64.1 % (v2), about -60 % (v3)"),
    ("train", RATE): Published(2.475, "+247.5 % (v2), about +190 % (v3)"),
    ("infer", MEMORY): Published(-0.83, "-83 % (as others report it)"),
}


class Points:
    """The rows of one number of text tokens, by what they are."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._found = {(x["mode"], x["method"], x["audio_tokens"], x.get("device")): x for x in self.rows}
        self.devices: list[str | None] = list(dict.fromkeys(x.get("device") for x in self.rows))

    @classmethod
    def by_text_tokens(cls, rows: Iterable[Row]) -> dict[int, Points]:
        found: dict[int, list[Row]] = {}
        for row in rows:
            found.setdefault(row["text_tokens"], []).append(row)
        return {count: cls(some) for count, some in found.items()}

    def methods(self, mode: str | None = None) -> list[str]:
        """In the order of METHODS, those that it lacks last."""
        found = dict.fromkeys(x["method"] for x in self.rows if mode in (None, x["mode"]))
        return [name for name in METHODS if name in found] + [name for name in found if name not in METHODS]

    def counts(self, mode: str | None = None) -> list[int]:
        """Numbers of audio tokens."""
        return sorted({x["audio_tokens"] for x in self.rows if mode in (None, x["mode"])})

    def row(self, mode: str, method: str, audio: int, device: str | None = None) -> Row | None:
        """None for the device takes the first, of which memory is as good as any's."""
        return self._found.get((mode, method, audio, self.devices[0] if device is None else device))

    def value(self, key: str, mode: str, method: str, audio: int, device: str | None = None) -> float | None:
        row = self.row(mode, method, audio, device)
        return None if row is None else value(row, key)

    def change(
        self, key: str, mode: str, method: str, base: str, audio: int, device: str | None = None
    ) -> float | None:
        """How much a figure differs from another method's, as a share of that: -0.6 is 60 % less."""
        mine, other = (self.value(key, mode, name, audio, device) for name in (method, base))
        return None if mine is None or not other or method == base else mine / other - 1


def value(row: Row, key: str) -> float | None:
    """A row's figure, in GiB or per second, or the seconds of a whole batch; None where it did not run."""
    if row["status"] != "ok":
        return None
    if key == RATE:
        return float(row[RATE]["p50"])
    if key == "seconds":
        return float(row["batch_size"] / row[RATE]["p50"])
    return float(row[key]) / GIB


@dataclass(frozen=True)
class Step:
    """From one method to the next: what a figure falls by, and as a share of the whole fall."""

    start: str
    end: str
    what: str
    saved: float | None
    share: float | None


def waterfall(values: Mapping[str, float | None]) -> list[Step]:
    """From PLITS to LAL by way of the methods between that `values` has; a step over a missing one is both steps."""
    chain = [name for name in CHAIN if name in values]
    if len(chain) < 2 or chain[0] != "plits" or chain[-1] != "lal":
        return []
    first, last = values["plits"], values["lal"]
    whole = None if first is None or last is None else first - last
    names = list(CHAIN)
    steps = []
    for start, end in pairwise(chain):
        before, after = values[start], values[end]
        saved = None if before is None or after is None else before - after
        what = "; ".join(CHAIN[name] for name in names[names.index(start) + 1 : names.index(end) + 1])
        steps.append(Step(start, end, what, saved, saved / whole if saved is not None and whole else None))
    return steps
