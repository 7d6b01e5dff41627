"""Tables in Markdown."""

from __future__ import annotations

from palkernels.bench.report.table import Table

__all__ = ["to_markdown"]


def to_markdown(table: Table) -> str:
    """Return the table without its title; Markdown has no groups, so their names begin the columns' headings."""
    headings = [f"{column.group} {column.heading}".strip() for column in table.columns]
    rules = ["---" if column.text else "---:" for column in table.columns]
    rows = [row + [""] * (len(headings) - len(row)) for row in table.rows]
    return "".join(f"| {' | '.join(_escaped(cells))} |\n" for cells in (headings, rules, *rows))


def _escaped(cells: list[str]) -> list[str]:
    return [cell.replace("|", r"\|") for cell in cells]
