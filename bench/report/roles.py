"""What tables and pictures know of the methods: labels, looks, and which part each one plays.

A result document may name methods that this version does not have; they keep their name and get a look of their own.
"""

from __future__ import annotations

from collections.abc import Iterable

from palkernels.bench.methods import LEVERS, METHODS, MODES, Style

__all__ = [
    "BASELINE", "BASELINES", "LEVERS", "MODES", "OURS", "Style", "about", "against", "chain", "in_order", "label",
    "style_of",
]  # fmt: skip

BASELINE, OURS = "plits", "lal"
BASELINES = tuple(name for name, method in METHODS.items() if method.is_baseline)  # LAL is held against these


UNKNOWN = Style("#555555", "h")


def style_of(method: str) -> Style:
    return METHODS[method].style if method in METHODS else UNKNOWN


def label(method: str) -> str:
    """Return the method's name in tables and pictures."""
    return METHODS[method].label if method in METHODS else method


def against(base: str) -> str:
    """Return the heading of gains over a method, with the last part of its label: vs PLITS, vs tuned."""
    return f"vs {label(base).rpartition(', ')[2]}"


def about(method: str) -> str:
    """Return the sentence that explains the method; "" for an unknown one."""
    return METHODS[method].about if method in METHODS else ""


def chain() -> dict[str, str]:
    """Return the methods from the baseline to LAL, each with what the step to it changes."""
    return {name: method.step for name, method in METHODS.items() if method.step is not None}


def in_order(methods: Iterable[str]) -> list[str]:
    """Return each method once: known ones as METHODS has them, then the others."""
    named = dict.fromkeys(methods)
    return [name for name in METHODS if name in named] + [name for name in named if name not in METHODS]
