"""How sure a figure is: intervals that hold the true one 95 times of 100, were the samples drawn again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["RESAMPLES", "ratio_interval", "wilson_interval"]

DEVIATES = 1.959964  # of a normal distribution, between whose negative and which 95 % lie
RESAMPLES = 1000


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (E. B. Wilson, 1927), which holds for few samples and near 0 and
    1, too.

    Args:
        hits: how many of the samples are right.
        count: how many there are, at least 1.
    """
    share, square = hits / count, DEVIATES**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = DEVIATES / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half  # where rounding would miss


def ratio_interval(parts: Sequence[int], wholes: Sequence[int]) -> tuple[float, float] | None:
    """Return the interval of a sum of parts divided by a sum of wholes, as errors by words are, from samples drawn
    again with replacement (percentile bootstrap); None of fewer than two samples.

    The draws are the same in each call.
    """
    if len(parts) < 2:
        return None
    pairs = torch.tensor([parts, wholes], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(RESAMPLES):  # one by one: all at once would take a thousand times the samples' memory
        part, whole = pairs[:, torch.randint(len(parts), (len(parts),), generator=generator)].sum(dim=1).tolist()
        if whole:
            ratios.append(part / whole)
    low, high = torch.quantile(
        torch.tensor(ratios, dtype=torch.float64), torch.tensor([0.025, 0.975]).double()
    ).tolist()
    return low, high
