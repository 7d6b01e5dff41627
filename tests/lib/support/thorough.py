"""How much is tried of what can be combined: everything, or as much as shows every part and every pair of parts.

PALKERNELS_TESTS=all, as `make test-oldest` and `make mutants` set it, tries everything.
"""

import itertools
import os
from collections.abc import Iterable
from typing import Any

EVERYTHING = os.environ.get("PALKERNELS_TESTS") == "all"


def combinations(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Combine the axes like `itertools.product`; without EVERYTHING, as the fields of one colour on a chessboard.

    Of three axes every pair of two values is still there, and of two axes every value.
    """
    numbered = itertools.product(*map(enumerate, axes))
    places = [tuple(zip(*each, strict=True)) for each in numbered]
    return [values for numbers, values in places if EVERYTHING or sum(numbers) % 2 == 0]


def cases(count: int) -> int:
    """This many random cases; without EVERYTHING half of them."""
    return count if EVERYTHING else (count + 1) // 2
