"""Batches of samples of like length: less padding, in an order that a seed and an epoch decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from palkernels.model.data.seeds import permutation

__all__ = ["LengthBuckets"]

BATCHES_OF_A_POOL = 50  # that are sorted together: more pad less, fewer mix samples more


class LengthBuckets(Sampler[int]):
    """A sampler of indices of which each ``batch_size`` in a row are of like length.

    Samples are shuffled, sorted by length within pools of 50 batches, cut into batches, and the batches shuffled. The
    batch with the longest sample comes first, so that a step that needs too much memory is the first. What is left
    over, fewer than ``batch_size`` samples, are any of them and come last.

    Every process makes the same order, and who deals out batches in turn, as accelerate does, gives processes parts of
    one such batch: one process with 8 samples a step and two with 4 train on the same samples in each step, but for
    what is left over.

    Args:
        lengths: How long each sample is; those of :meth:`Mixture.lengths` follow its epoch.
        batch_size: Samples of one step, of all processes together, without gradient accumulation.
        seed: Of the order.
        drop_last: Whether what is left over is left out.

    Raises:
        ValueError: There are no lengths, or ``batch_size`` is no positive integer.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, seed: int = 0, *, drop_last: bool = False) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self._epoch = 0
        if not len(self):
            raise ValueError(f"lengths must be of at least one batch, got {len(lengths)} for batches of {batch_size}")

    @property
    def epoch(self) -> int:
        """The epoch whose order it gives; that of the mixture, where the lengths are of one."""
        epoch: int = getattr(self.lengths, "epoch", self._epoch)
        return epoch

    def set_epoch(self, epoch: int) -> None:
        """Give the order of another epoch, from 0."""
        self._epoch = epoch
        if hasattr(self.lengths, "set_epoch"):
            self.lengths.set_epoch(epoch)

    def __len__(self) -> int:
        count = len(self.lengths)
        return count - count % self.batch_size if self.drop_last else count

    def __iter__(self) -> Iterator[int]:
        epoch, size = self.epoch, self.batch_size
        lengths = torch.tensor(list(self.lengths), dtype=torch.float64)
        order = permutation(len(lengths), "samples", self.seed, epoch)
        whole = len(order) - len(order) % size
        pools = order[:whole].split(size * BATCHES_OF_A_POOL)  # type: ignore[no-untyped-call]
        ordered = [pool[lengths[pool].argsort(descending=True, stable=True)] for pool in pools]
        batches = torch.cat([*ordered, order[:0]]).view(-1, size)
        batches = batches[permutation(len(batches), "batches", self.seed, epoch)]
        if len(batches):
            longest = int(lengths[batches].max(dim=1).values.argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        yield from batches.flatten().tolist()
        if not self.drop_last:
            yield from order[whole:].tolist()
