"""The optimizer of every measured and simulated training step."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["LEARNING_RATE", "make_adamw"]

LEARNING_RATE = 1e-5  # small: it does not matter what is learnt, only that weights stay finite


def make_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW for the parameters, with its states already there, as in every step of a training but the first."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer
