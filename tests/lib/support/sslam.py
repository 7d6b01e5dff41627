"""The sizes of a small SSLAM encoder, and the positions that every one has."""

import numpy
import torch
from torch import Tensor

WIDTH, LAYERS, HEADS = 128, 2, 2  # heads as wide as the published ones


def by_formula(width: int, steps: int = 64) -> Tensor:
    """MAE's positions one by one: for the frequency and then the time index i, sin and cos of i / 10000^(4k/width)."""
    quarter = width // 4
    rates = 1 / 10_000 ** (numpy.arange(quarter) / quarter)
    rows = [
        numpy.concatenate([numpy.sin(f * rates), numpy.cos(f * rates), numpy.sin(t * rates), numpy.cos(t * rates)])
        for t in range(steps)
        for f in range(8)
    ]
    return torch.tensor(numpy.stack(rows))
