"""The methods that the study compares: how each lets the same encoder's audio into the same language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from palkernels.bench.methods.base import Style

__all__ = ["CONTESTANTS", "Contestant"]


@dataclass(frozen=True)
class Contestant:
    """One method of the study.

    Attributes:
        name: What the command and result files call it.
        label: What tables and pictures call it.
        about: The sentence that explains it.
        style: How it looks.
        integration: How audio enters: "lal", "plits" or "flamingo".
        connector: Settings of the MLP connector.
        settings: Further settings of the model, as a recipe has them.
    """

    name: str
    label: str
    about: str
    style: Style
    integration: str
    connector: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def model(self, llm: str, encoder: str, window_seconds: float | None) -> dict[str, Any]:
        """Return the ``model`` of its recipe, of a language model's file and the folder of a Whisper encoder."""
        entry: dict[str, Any] = {"type": "whisper", "checkpoint": encoder, "integration": self.integration}
        if window_seconds is not None:
            entry["config"] = {"window_seconds": window_seconds}
        entry["connector"] = {"type": "mlp", **self.connector}
        return {"llm": llm, "encoders": [entry], **self.settings}


_ALL = (
    Contestant(
        "lal",
        "LAL",
        "audio is keys and values of every layer",
        Style("#1f5fae", "o"),
        "lal",
    ),
    Contestant(
        "lal-delayed",
        "LAL, delayed",
        "audio is keys and values from layer 4 on",
        Style("#3f97c9", "P"),
        "lal",
        settings={"layers": "4-"},
    ),
    Contestant(
        "plits",
        "PLITS",
        "every audio token stands before the text",
        Style("#c2402e", "s"),
        "plits",
    ),
    Contestant(
        "plits-pooled",
        "PLITS, pooled 4:1",
        "four encoder states are joined to one token before the text",
        Style("#e08e2b", "D"),
        "plits",
        connector={"stack": 4},
    ),
    Contestant(
        "pal-unified",
        "PAL, unified",
        "8 tokens that sum up the audio stand before the text, all of it is keys and values",
        Style("#3a9d5d", "^"),
        "lal",
        settings={"summary_tokens": 8},
    ),
    Contestant(
        "flamingo",
        "Flamingo",
        "gated cross-attention layers, one before every fourth layer",
        Style("#8a63a8", "v"),
        "flamingo",
        settings={"flamingo": {"every": 4}},
    ),
)
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}
