"""Tables of what encoders give and of how connectors begin to learn."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from palkernels.bench.report.table import Column, Table

__all__ = ["starts", "windows"]

Row = dict[str, Any]
TRAINED = {"connector": "connector", "all": "connector and language model"}


def windows(rows: list[Row]) -> Table:
    """How close Whisper's states in a short window are to those in its own, by kind of clip, and the encoder's time."""
    kinds = list(dict.fromkeys(row["clips"] for row in rows))
    columns = [Column(kind, text=True) for kind in kinds]
    table = Table("", [Column("window, s"), Column("encoder, ms"), *columns])
    for window in dict.fromkeys(row["window_seconds"] for row in rows):
        of_window = {row["clips"]: row for row in rows if row["window_seconds"] == window}
        cosines = [
            f"{row['mean_cosine']:.3f} ({row['least_cosine']:.3f})" if row else "cut"
            for row in map(of_window.get, kinds)
        ]
        table.rows.append([f"{window:g}", f"{1e3 * next(iter(of_window.values()))['encoder_seconds']:.0f}", *cosines])
    return table


def starts(documents: Sequence[dict[str, Any]]) -> Table:
    """How LAL's connectors learn from where they begin, each figure from the least to the most of all seeds."""
    columns = [Column("trains", text=True), Column("begins", text=True), Column("first loss")]
    half = next(row["samples"] // 2 + 1 for document in documents for row in document["rows"])
    columns += [Column("first gradient norm"), Column(f"mean loss from clip {half} on")]
    table = Table("", [*columns, Column("correct for voices unheard in training (chance 0.05)")])
    rows = [row for document in documents for row in document["rows"] if row["integration"] == "lal"]
    for train in dict.fromkeys(row["train"] for row in rows):
        of_train = [row for row in rows if row["train"] == train]
        seeds = len({row["seed"] for row in of_train})
        named = f"{TRAINED[train]}, {seeds} seeds"
        for initialization in dict.fromkeys(row["initialization"] for row in of_train):
            runs = [row for row in of_train if row["initialization"] == initialization]
            late = [mean(row["losses"][len(row["losses"]) // 2 :]) for row in runs]
            firsts = [[row[name] for row in runs] for name in ("first_loss", "first_gradient_norm")]
            correct = [row["accuracy"] for row in runs]
            figures = (_range(firsts[0], 1), _range(firsts[1], 0), _range(late, 2), _range(correct, 2))
            table.rows.append([named, initialization, *figures])
            named = ""
    return table


def _range(values: Sequence[float], digits: int) -> str:
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least} to {most}"
