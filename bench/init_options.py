"""What the command `init` is given: the parts of an audio LLM, in words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palkernels.bench.errors import UserError
from palkernels.model import CONNECTORS, TOWERS

__all__ = ["Options", "parse_encoders"]

INTEGRATIONS = ("lal", "plits", "flamingo")
SMALL_WHISPER = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}


@dataclass(frozen=True)
class Options:
    """What the command was given; see its help. None and (): nothing."""

    directory: Path
    llm: str | None = None
    encoders: tuple[str, ...] = ()
    integrations: tuple[str, ...] = ()
    connectors: tuple[str, ...] = ()
    window_seconds: float | None = None
    layers: str | None = None
    dtype: str = "auto"
    seed: int = 0


def parse_encoders(options: Options) -> list[dict[str, Any]]:
    """Return the encoders as :func:`build` takes them, one entry for those that a connector fuses.

    Raises:
        UserError: an option is none, or names an encoder that is not there.
    """
    towers = [_tower(word) for word in options.encoders]
    if options.llm is None:
        towers = [{"type": "whisper", "checkpoint": None, "config": SMALL_WHISPER}]
    types = [tower["type"] for tower in towers]
    if options.window_seconds is not None:
        if "whisper" not in types:
            raise UserError(f"--window-seconds must be given with a Whisper encoder, got {', '.join(types)}")
        for tower in towers:
            if tower["type"] == "whisper":
                tower["config"] = {**tower.get("config", {}), "window_seconds": options.window_seconds}
    integrations = _by_type("--integration", options.integrations, types)
    connectors = _by_type("--connector", options.connectors, types)
    entries: list[dict[str, Any]] = []
    while towers:
        name = towers[0]["type"]
        connector = _connector(connectors.get(name, connectors.get("", "mlp")))
        fused = CONNECTORS[connector["type"]].tower_types
        members = _taken(towers, (name,) if fused is None else fused, connector["type"])
        ways = {integrations.get(member["type"], integrations.get("", "lal")) for member in members}
        if unknown := ways - set(INTEGRATIONS):
            raise UserError(f"--integration must be {_names(INTEGRATIONS)}, got {unknown.pop()!r}")
        if len(ways) > 1:
            raise UserError(
                f"--integration must be one for encoders that a connector fuses, got {_names(sorted(ways), 'and')}"
            )
        entry = {"integration": ways.pop(), "connector": connector}
        parts = members[0] if fused is None else {key: [m.get(key) for m in members] for key in ("type", "checkpoint")}
        entries.append(parts | entry)
    return entries


def _tower(word: str) -> dict[str, Any]:
    """Return an encoder from TYPE or TYPE=CHECKPOINT."""
    name, equals, checkpoint = word.partition("=")
    if name not in TOWERS or (equals and not checkpoint):
        raise UserError(f"--encoder must be TYPE=DIRECTORY, TYPE being {_names(TOWERS)}, got {word!r}")
    return {"type": name, "checkpoint": os.path.expanduser(checkpoint) if checkpoint else None}


def _by_type(option: str, words: Sequence[str], types: Sequence[str]) -> dict[str, str]:
    """Return what an option says of each type of encoder, and under "" of all others."""
    said: dict[str, str] = {}
    for word in words:
        head, comma, settings = word.partition(",")
        name, _, value = head.rpartition("=")
        if name and name not in types:
            raise UserError(f"{option} must name an encoder that is there, {_names(types)}, got {name!r}")
        if name in said:
            raise UserError(f"{option} must be given once{f' for {name}' if name else ''}, got {word!r} too")
        said[name] = value + comma + settings
    return said


def _connector(text: str) -> dict[str, Any]:
    """Return a connector from TYPE[,KEY=VALUE...]."""
    name, *pairs = text.split(",")
    if name not in CONNECTORS:
        raise UserError(f"--connector must be {_names(CONNECTORS)}, got {name!r}")
    connector: dict[str, Any] = {"type": name}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals or key in connector:
            raise UserError(f"--connector must have settings such as {name},stack=4, got {pair!r}")
        try:
            connector[key] = json.loads(value)
        except ValueError:
            connector[key] = value
    return connector


def _taken(towers: list[dict[str, Any]], types: Sequence[str], connector: str) -> list[dict[str, Any]]:
    """Return the first encoder of each type and remove them; the first of all must be among them."""
    members = []
    for name in types:
        member = next((tower for tower in towers if tower["type"] == name), None)
        if member is None:
            raise UserError(f"--connector {connector} must have the encoders {_names(types, 'and')}, got no {name}")
        members.append(member)
    if all(member is not towers[0] for member in members):
        name = towers[0]["type"]
        raise UserError(
            f"--connector {connector} must be for {_names(types, 'and')}, got {name}: {name}=mlp is its own"
        )
    towers[:] = [tower for tower in towers if all(tower is not member for member in members)]
    return members


def _names(names: Iterable[str], word: str = "or") -> str:
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last
