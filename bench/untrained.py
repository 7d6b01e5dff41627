"""What no training has seen yet of a saved model, in a file beside it: `init` writes it, and `ask` says it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

__all__ = ["LANGUAGE_MODEL", "untrained_warning", "write_untrained"]

FILE = "untrained.json"
LANGUAGE_MODEL = "language model"


def write_untrained(directory: Path, parts: Sequence[str], seed: int) -> None:
    """Note which parts of a model have random weights, and their seed."""
    (directory / FILE).write_text(json.dumps({"untrained": list(parts), "seed": seed}) + "\n", encoding="utf-8")


def untrained_warning(directory: Path) -> str | None:
    """Return what a user must know of a saved model's answers; None: nothing."""
    try:
        parts = json.loads((directory / FILE).read_text(encoding="utf-8"))["untrained"]
    except FileNotFoundError:
        return None
    if LANGUAGE_MODEL in parts:
        return "The weights of this model are random: its answer means nothing."
    return f"This model is untrained in its {' and '.join(parts)}: what it says of a sound means nothing yet."
