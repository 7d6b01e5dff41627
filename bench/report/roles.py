"""What tables and pictures know of the methods: labels, looks, and which part each one plays.

A result document may name methods that this version does not have; they keep their name and get a look of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from palkernels.bench.methods.methods import LEVERS, METHODS, MODES

__all__ = [
    "BASELINE", "BASELINES", "LEVERS", "MODES", "OURS", "Style", "about", "against", "chain", "in_order", "label",
    "style_of",
]  # fmt: skip

BASELINE, OURS = "plits", "lal"
BASELINES = ("plits", "plits-tuned")  # the methods that LAL is held against


class Style(NamedTuple):
    color: str
    marker: str
    line: Any = "-"  # matplotlib's line style


# Warm colours where audio is in the sequence, cold ones where it is keys and values.
STYLES = {
    "plits": Style("#c0392b", "s"),
    "plits-tuned": Style("#e08e2b", "D", (0, (2, 2))),  # in inference it is PLITS, which must be seen under it
    "plits-pooled": Style("#8d6e63", "v"),
    "lal-eager": Style("#5bb5c9", "^"),
    "lal": Style("#1f5fae", "o"),
    "pal-multi": Style("#b8a03a", "<"),
    "pal-unified": Style("#274690", ">"),
    "flamingo": Style("#d67bb0", "*"),
    "lal-recompute": Style("#3a9d5d", "P"),
    "lal-checkpoint": Style("#7b5ea7", "X"),
    "lal-fused-loss": Style("#c76ba0", "p"),
}
UNKNOWN = Style("#555555", "h")
STEPS = {
    "plits": "",
    "plits-tuned": "the baseline's logits and attention backend",
    "lal-eager": "the integration: audio as keys and values",
    "lal": "our kernels",
}


def style_of(method: str) -> Style:
    return STYLES.get(method, UNKNOWN)


def label(method: str) -> str:
    """Return the method's name in tables and pictures."""
    return METHODS[method].label if method in METHODS else method


def against(base: str) -> str:
    """Return the heading of gains over a baseline, with the last part of its label: vs PLITS, vs tuned."""
    return f"vs {label(base).rpartition(', ')[2]}"


def about(method: str) -> str:
    """Return the sentence that explains the method; "" for an unknown one."""
    return METHODS[method].about if method in METHODS else ""


def chain() -> dict[str, str]:
    """Return the methods from the baseline to LAL, each with what the step to it changes."""
    return STEPS


def in_order(methods: Iterable[str]) -> list[str]:
    """Return each method once: known ones as METHODS has them, then the others."""
    named = dict.fromkeys(methods)
    return [name for name in METHODS if name in named] + [name for name in named if name not in METHODS]
