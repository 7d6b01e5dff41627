"""From a result document to the files of a run."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["files"]


def json_text(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def files(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, bytes]:
    return {names[0]: json_text(document)}
