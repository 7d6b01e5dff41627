"""The files of a run, made from its result document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palkernels.bench.report.document import csv_text, json_text
from palkernels.bench.report.html import report_page
from palkernels.bench.report.plot import render

__all__ = ["contents"]


def contents(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, bytes]:
    """Return the content of each file, in the format of its ending: .json, .csv, .png or .html."""
    write = {
        ".json": lambda: json_text(document),
        ".csv": lambda: csv_text(document["rows"], document["meta"].get("encoder_weights")).encode(),
        ".png": lambda: render(document),
        ".html": lambda: report_page(document).encode(),
    }
    return {name: write[Path(name).suffix]() for name in names}
