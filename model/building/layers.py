"""Layers as text names them: "all", "4-15", "4-" or "0,2,4"."""

import re
from typing import Any

__all__ = ["parse_layers"]

RANGE = re.compile(r"(\d{1,6})(?:(-)(\d{1,6})?)?")


def parse_layers(layers: Any, depth: int) -> Any:
    """Return the layers that a text names as numbers, both ends of a range included; what is no text, as it is.

    Args:
        layers: a text such as "4-15", "4-", which goes on to the last layer, or "0,2,4"; "all"; or numbers.
        depth: how many layers there are.

    Raises:
        ValueError: a text names no layers, or names some that are not there.
    """
    if not isinstance(layers, str) or layers == "all":
        return layers
    numbers: set[int] = set()
    for part in layers.split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f'layers must be "all", or numbers and ranges such as "4-15" or "4-", got {layers!r}')
        first, dash, last = match.groups()
        end = int(last) if last else depth - 1 if dash else int(first)
        if not int(first) <= end < depth:
            raise ValueError(f"layers must be from 0 to {depth - 1}, the first at most the last, got {layers!r}")
        numbers.update(range(int(first), end + 1))
    return sorted(numbers)
