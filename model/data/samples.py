"""Samples in their order, and the rows that gave none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from palkernels.model.data.clips import LengthsOfClips
from palkernels.model.data.reasons import RejectedError
from palkernels.model.data.sample import Sample

__all__ = ["Dropped", "Samples"]


@dataclass(frozen=True)
class Dropped:
    """A row that gives no sample.

    Attributes:
        source: Where it stands.
        reason: What it is counted under.
        detail: What is wrong with it, in one line.
    """

    source: str
    reason: str
    detail: str


class Samples(Sequence[Sample]):
    """Samples in their order, and what was dropped on the way to them.

    Args:
        samples: The samples.
        dropped: The rows, or samples, that are not among them.
        lengths: How long the clips are that have been looked at.
    """

    def __init__(
        self, samples: Sequence[Sample], dropped: Sequence[Dropped] = (), lengths: LengthsOfClips | None = None
    ) -> None:
        self.samples = tuple(samples)
        self.dropped = tuple(dropped)
        self.lengths = LengthsOfClips() if lengths is None else lengths

    @classmethod
    def sifted(
        cls,
        samples: Iterable[Sample],
        why_not: Callable[[Sample], RejectedError | None],
        dropped: Sequence[Dropped],
        lengths: LengthsOfClips,
    ) -> Samples:
        """Return the samples that nothing is wrong with; the others join ``dropped``, each with its reason."""
        kept, more = [], list(dropped)
        for sample in samples:
            reason = why_not(sample)
            if reason is None:
                kept.append(sample)
            else:
                more.append(Dropped(sample.source, reason.reason, f"{sample.source}: {reason}"))
        return cls(kept, more, lengths)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self.samples[index], self.dropped, self.lengths)
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def reasons(self) -> dict[str, int]:
        """Return how many were dropped for each reason, most first."""
        return dict(Counter(row.reason for row in self.dropped).most_common())

    def seconds(self, sample: Sample) -> float:
        """Return how long all clips of a sample are together, in seconds, as their headers say.

        Raises:
            AudioError: A clip cannot be read.
        """
        return sum(self.lengths.of(clip).seconds for clip in sample.clips())

    def summary(self) -> str:
        """Return one line: how many samples there are, and what was dropped for which reason."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons().items())
        total = f"{len(self):,} samples of {len(self) + len(self.dropped):,}"
        return f"{total}; dropped: {reasons}" if reasons else total
