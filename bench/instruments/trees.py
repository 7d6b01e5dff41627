"""The tensors in an operation's arguments and results."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["tensors_in"]


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and the values of dicts. PyTorch's own walk knows more containers and takes
    several times as long, which counts where it is done for every operation of a model."""
    found: list[Tensor] = []
    _add(tree, found)
    return found


def _add(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            _add(part, found)
    elif isinstance(tree, dict):
        for part in tree.values():
            _add(part, found)
