"""Several sources' samples as one dataset, each as often as its weight says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

from palkernels.model.data.sample import Sample
from palkernels.model.data.seeds import permutation
from palkernels.model.data.sources import check_weight

__all__ = ["Mixture", "MixtureLengths"]


class Mixture(Dataset[Sample]):
    """A map-style dataset of the samples of one epoch, source by source; a sampler shuffles them.

    A source of n samples with weight w has round(w * n) of them in each epoch, at least one. They are dealt out from
    one endless row of the source's samples, shuffled anew each time all have had their turn: with weight 0.5 two
    epochs see every sample once, with weight 2 one epoch sees each twice. Weight 1 is every sample once an epoch.
    Which they are depends on seed and epoch alone.

    Args:
        parts: The samples of each source.
        weights: A positive number for each; None: 1 for all.
        seed: Of what is drawn.

    Raises:
        ValueError: A part is empty, or there is not a positive weight for each.
    """

    def __init__(
        self, parts: Sequence[Sequence[Sample]], weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        weights = [1.0] * len(parts) if weights is None else list(weights)
        if not parts or not all(len(part) for part in parts):
            raise ValueError(f"parts must be at least one, none of them empty, got {[len(part) for part in parts]}")
        if len(weights) != len(parts):
            raise ValueError(f"weights must be one for each of {len(parts)} parts, got {len(weights)}")
        for weight in weights:
            check_weight(weight)
        self.parts = tuple(parts)
        self.counts = tuple(max(1, round(weight * len(part))) for weight, part in zip(weights, parts, strict=True))
        self.seed = seed
        # Shared with a loader's workers: persistent ones keep the dataset that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._drawn: tuple[int, list[torch.Tensor]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch whose samples it has."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Take the samples of another epoch, from 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}, got {index}")
        index %= len(self)
        part = next(part for part, stop in enumerate(accumulate(self.counts)) if index < stop)
        number = int(self.numbers()[part][index - sum(self.counts[:part])])
        return self.parts[part][number]

    def lengths(self, of: Callable[[Sequence[Sample]], Sequence[float]]) -> MixtureLengths:
        """Return how long each sample is, for :class:`LengthBuckets`: those of the epoch that the mixture is in.

        Args:
            of: Measures samples, as :meth:`Collator.lengths` does. Each part is measured once.
        """
        return MixtureLengths(self, [list(of(part)) for part in self.parts])

    def numbers(self) -> list[torch.Tensor]:
        """Return the numbers of each part's samples in this epoch."""
        epoch = self.epoch
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, [self._deal(part, epoch) for part in range(len(self.parts))]
        return self._drawn[1]

    def _deal(self, part: int, epoch: int) -> torch.Tensor:
        """Return the ``counts[part]`` next numbers of a part's endless row."""
        size, count = len(self.parts[part]), self.counts[part]
        if size == count:
            return torch.arange(size)
        start, stop = epoch * count, (epoch + 1) * count
        rounds = [
            permutation(size, "mixture", self.seed, part, number) for number in range(start // size, -(-stop // size))
        ]
        first = start - start // size * size
        return torch.cat(rounds)[first : first + count]


class MixtureLengths(Sequence[float]):
    """How long the samples of a mixture are, in the epoch that it is in.

    Args:
        mixture: The mixture.
        measured: The lengths of each part's samples.
    """

    def __init__(self, mixture: Mixture, measured: Sequence[Sequence[float]]) -> None:
        self.mixture = mixture
        self.measured = [torch.tensor(lengths, dtype=torch.float64) for lengths in measured]

    @property
    def epoch(self) -> int:
        """The mixture's."""
        return self.mixture.epoch

    def set_epoch(self, epoch: int) -> None:
        """Take the mixture to another epoch."""
        self.mixture.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: Any) -> Any:
        return self._all()[index]

    def __iter__(self) -> Iterator[float]:
        return iter(self._all())

    def _all(self) -> list[float]:
        numbers = self.mixture.numbers()
        of_parts = [lengths[drawn] for lengths, drawn in zip(self.measured, numbers, strict=True)]
        lengths: list[float] = torch.cat(of_parts).tolist()
        return lengths
