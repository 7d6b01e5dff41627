"""Intervals: of proportions, and of ratios of sums."""

import pytest
import torch

from palkernels.model.evaluation.intervals import ratio_interval, wilson_interval


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (8, 10), (1, 1), (263, 300), (1, 100_000)])
def test_wilson(hits: int, count: int) -> None:
    """Its ends are the shares that lie 1.96 of their own standard deviations from what was seen."""
    low, high = wilson_interval(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(hits / count - end) == pytest.approx(1.959964 * (end * (1 - end) / count) ** 0.5)
    assert (low == 0, high == 1) == (hits == 0, hits == count)


def test_wilson_holds_the_true_share_95_times_of_100() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.binomial(torch.full((4000,), 40.0), torch.full((4000,), 0.9), generator=generator).long().tolist()
    inside = [low <= 0.9 <= high for low, high in (wilson_interval(hits, 40) for hits in drawn)]
    assert 0.92 < sum(inside) / len(inside) < 0.98


def test_a_ratio_of_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    wholes = torch.randint(1, 20, (400,), generator=generator)
    parts = torch.binomial(wholes.float(), torch.full((400,), 0.3), generator=generator).long()
    low, high = ratio_interval(parts.tolist(), wholes.tolist()) or (0.0, 0.0)
    ratio = parts.sum().item() / wholes.sum().item()
    error = (0.3 * 0.7 / wholes.sum().item()) ** 0.5  # were every word independent
    assert low < ratio < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert ratio_interval(parts.tolist(), wholes.tolist()) == (low, high)


def test_ratios_without_an_interval() -> None:
    assert ratio_interval([1], [3]) is None
    assert ratio_interval([0, 0, 0], [3, 0, 4]) == (0.0, 0.0)
