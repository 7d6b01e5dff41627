"""Random numbers that depend on nothing but the integers they are named by: neither on process nor on version."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["permutation"]


def permutation(size: int, *name: int | str) -> Tensor:
    """Return the numbers 0 to ``size`` - 1 in an order that ``name`` decides, such as a seed and an epoch."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(size, generator=generator)
