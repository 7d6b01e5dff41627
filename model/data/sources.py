"""Where samples come from, as a recipe says it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FORMATS", "Source", "check_weight"]

FORMATS = ("auto", "messages", "openaqa", "columns")


@dataclass(frozen=True)
class Source:
    """Where samples come from.

    Args:
        path: A file of JSON lines or with a JSON array, a parquet file, a directory that ``datasets`` saved, or a
            ``datasets.Dataset`` itself.
        format: "messages": conversations with clips (ms-swift, LLaMA-Factory's sharegpt, transformers); "openaqa":
            OpenAQA's questions; "columns": a dataset with an Audio column; "auto": told by the path's ending and
            the rows.
        weight: How much of it an epoch of a :class:`Mixture` takes: 0.5 half of its samples, 2 each of them twice.
        task: What tables call the kind of its samples, where a row does not say.
        folder: Where relative paths of clips start; None: where the file is.
        columns: For "columns": which column is "audio", "question", "answer", "task" and "choices", where it is none
            of the names that :mod:`palkernels.model.data.columns` knows.
        question: For "columns": what is asked of each clip where no column says it.
        split: Of a saved ``DatasetDict``; None: its only one.

    Raises:
        ValueError: A value is none of these.
    """

    path: Any
    format: str = "auto"
    weight: float = 1.0
    task: str = ""
    folder: str | os.PathLike[str] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    split: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        check_weight(self.weight)

    @property
    def name(self) -> str:
        """What its rows are called after."""
        name = Path(self.path).name if isinstance(self.path, str | os.PathLike) else "dataset"
        return name if self.split is None else f"{name}/{self.split}"


def check_weight(weight: object) -> None:
    """Raise a ValueError for a weight that is not a positive, finite number."""
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"weight must be a positive number, got {weight!r}")
