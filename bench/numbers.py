"""Numbers on the command line. Nothing heavy is imported here: --help waits for it."""

from __future__ import annotations

from palkernels.bench.errors import UserError

__all__ = ["parse_counts", "parse_seconds"]


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers that an option was given.

    Raises:
        UserError: it was given something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} must be whole numbers separated by commas, got {text!r}") from None


def parse_seconds(option: str, text: str) -> tuple[float, ...]:
    """Return the seconds that an option was given; none for "none".

    Raises:
        UserError: it was given something else.
    """
    try:
        return () if text == "none" else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} must be seconds separated by commas, or none, got {text!r}") from None
