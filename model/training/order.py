"""Which samples each step of a stage is of, decided by seed and recipe alone.

A step's samples are the same on any number of processes and in any number of pieces: they are dealt out afterwards.

    order     0: [s7 s2 s9 s4]          1: [s1 s8 s3 s5]           of step 0, 1
    two processes, two pieces each
    process 0    [s7] [s9]                 [s1] [s3]
    process 1    [s2] [s4]                 [s8] [s5]

Where the last step of an epoch has fewer samples than there are pieces, a piece repeats one of them without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from palkernels.model.data.sample import Sample

__all__ = ["Collate", "Given", "Order", "Piece", "Pieces", "only_foretold"]

IGNORED = -100


@dataclass(frozen=True)
class Piece:
    """A sample in a batch; ``heard``: whether its labels count."""

    sample: Sample
    heard: bool = True


class Order:
    """The samples of each step of a stage.

    Args:
        size: How many samples an epoch has.
        epoch: Returns an epoch's samples in their order.
        batch: How many samples a step is of.
        epochs, steps, samples: How long the stage is, one of them; the last epoch may be a part of one.
    """

    def __init__(
        self,
        size: int,
        epoch: Callable[[int], Sequence[Sample]],
        batch: int,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        samples: int | None = None,
    ) -> None:
        self.epoch, self.batch = epoch, batch
        self.size = size
        self.steps_of_epoch = math.ceil(size / batch)
        if steps is not None:
            whole, rest = divmod(steps, self.steps_of_epoch)
            self.samples = whole * size + min(rest * batch, size)
        else:
            self.samples = samples if samples is not None else max(1, round((epochs or 1.0) * size))

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.size)
        return whole * self.steps_of_epoch + math.ceil(rest / self.batch)

    def samples_after(self, step: int) -> int:
        """Return how many samples the first ``step`` steps are of."""
        whole, rest = divmod(step, self.steps_of_epoch)
        return min(whole * self.size + min(rest * self.batch, self.size), self.samples)

    def __iter__(self) -> Iterator[list[Sample]]:
        remaining, number = self.samples, 0
        while remaining:
            samples = list(self.epoch(number))[:remaining]
            for first in range(0, len(samples), self.batch):
                yield samples[first : first + self.batch]
            remaining -= len(samples)
            number += 1


class Pieces(Sampler[list[Piece]]):
    """One process's batches, ``pieces`` of them for each step."""

    def __init__(self, order: Order | Sequence[list[Sample]], pieces: int, rank: int = 0, world: int = 1) -> None:
        self.order, self.pieces, self.rank, self.world = order, pieces, rank, world

    def __len__(self) -> int:
        return len(self.order) * self.pieces

    def __iter__(self) -> Iterator[list[Piece]]:
        parts = self.pieces * self.world
        for samples in self.order:
            bounds = [len(samples) * i // parts for i in range(parts + 1)]
            for piece in range(self.pieces):
                i = piece * self.world + self.rank
                own = samples[bounds[i] : bounds[i + 1]]
                yield [Piece(sample) for sample in own] or [Piece(samples[0], heard=False)]


class Given(Dataset[Piece]):
    """A dataset whose indices are its items: the sampler knows them already."""

    def __getitem__(self, index: Any) -> Piece:
        piece: Piece = index
        return piece


class Collate:
    """Makes batches of pieces: a collator's of their samples, without the labels of those that do not count, and with
    logits only where a label is foretold."""

    def __init__(self, collator: Callable[[Sequence[Sample]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        batch = self.collator([piece.sample for piece in pieces])
        silent = torch.tensor([not piece.heard for piece in pieces])
        if silent.any():
            batch["labels"] = batch["labels"].masked_fill(_rows(batch, silent), IGNORED)
        return only_foretold(batch) | {"use_cache": False}


def only_foretold(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch whose forward computes logits only where a label of one of its texts is foretold.

    The loss is the same: the other logits have no part in it. But they are most of what there is to compute behind the
    layers, and of the memory of a large vocabulary.

    Args:
        batch: With ``labels`` (B, T).

    Returns:
        The same, with the N positions as ``logits_to_keep`` (N,), and as ``shift_labels`` (B, N) what they foretell.
    """
    foretold = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    columns = (foretold != IGNORED).any(dim=0).nonzero().squeeze(1)
    if not len(columns):
        columns = columns.new_zeros(1)  # transformers' loss needs some
    return batch | {"logits_to_keep": columns, "shift_labels": foretold[:, columns].contiguous()}


def _rows(batch: dict[str, Any], chosen: Tensor) -> Tensor:
    """Return which tokens belong to chosen samples, of a padded or a packed batch."""
    labels: Tensor = batch["labels"]
    if labels.shape[0] == len(chosen):
        return chosen[:, None].expand_as(labels)
    text = (batch["position_ids"] == 0).cumsum(dim=1) - 1
    return chosen[text]
