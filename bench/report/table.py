"""A table as data, and how figures are written in its cells.

The builders in tables.py make tables; terminal.py, markdown.py, html.py and plot.py draw them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

__all__ = ["Column", "Table", "change", "factor", "gib", "number"]


@dataclass(frozen=True)
class Column:
    """A heading, and the group's name that is written once above neighbouring columns."""

    heading: str
    group: str = ""
    text: bool = False  # aligned left


@dataclass
class Table:
    """Rows of cells. "" is a cell without a figure; a row that ends early has the reason for it in its last cell."""

    title: str
    columns: list[Column]
    rows: list[list[str]] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The groups' names from left to right, each with its number of columns."""
        return [(name, len(list(columns))) for name, columns in groupby(column.group for column in self.columns)]

    def is_repeat(self, index: int) -> bool:
        """Return whether a row begins with the same cell as the row before it, which need not be written again."""
        return index > 0 and self.rows[index][0] == self.rows[index - 1][0]

    def is_short(self, row: list[str]) -> bool:
        """Return whether the row ends early."""
        return len(row) < len(self.columns)


def gib(size: float | None) -> str:
    """Write a size with two digits after the point, a small one with four."""
    return "" if size is None else f"{size:.{4 if 5e-5 <= abs(size) < 0.0095 else 2}f}"


def number(x: float | None) -> str:
    """Write a number with at least three digits: 0.0734, 7.28, 5,440."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:#.3g}".removesuffix(".")


def change(share: float | None) -> str:
    """Write a relative change: -0.6 is -60.0 %."""
    return "" if share is None else f"{round(100 * share, 1) + 0.0:+,.1f} %"  # + 0.0: no "-0.0"


def factor(share: float | None) -> str:
    """Write a relative change as a multiple: 1.0 is 2.00x."""
    return "" if share is None else f"{1 + share:.2f}x"
