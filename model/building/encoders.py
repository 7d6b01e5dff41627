"""An audio LLM's encoders as a recipe names them: each with its checkpoint, its integration and its connector."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from palkernels.model.encoders.base import Tower
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.configuration_pal import complete_entry
from palkernels.model.pal.parts import outline_connectors

__all__ = ["check_tower", "entries_and_towers"]

KEYS = ("type", "checkpoint", "config", "integration", "connector")


def entries_and_towers(
    encoders: Sequence[dict[str, Any]], freeze: bool, seed: int
) -> tuple[list[dict[str, Any]], list[Tower]]:
    """Return the entries that :class:`PalConfig` takes, and the towers that they name.

    Args:
        encoders: {"type", "checkpoint", "config", "integration", "connector"} each. ``checkpoint`` is a directory, or
            None for random weights, of which ``config`` then gives the shape; beside a checkpoint it may hold Whisper's
            ``window_seconds`` alone. An entry with several types, which its connector fuses, has a list of each. A
            connector's settings stand beside its type.
        freeze: whether the towers keep their weights in training.
        seed: of random weights.

    Raises:
        TypeError, ValueError: an entry is malformed, or a checkpoint does not hold such an encoder.
    """
    if not isinstance(encoders, list | tuple) or not encoders:
        raise ValueError(f"encoders must be a list of at least one entry, got {encoders!r}")
    entries = [_checked(encoder) for encoder in encoders]
    described: list[tuple[str, Any, Any]] = []
    for entry in entries:
        several = not isinstance(entry["type"], str)
        types = list(entry["type"]) if several else [entry["type"]]
        checkpoints, configs = (_one_each(entry, name, len(types), several) for name in ("checkpoint", "config"))
        described += zip(types, checkpoints, configs, strict=True)
    for tower_type, checkpoint, config in described:  # all of them before any weights are read
        check_tower(tower_type, checkpoint is not None, config or {})
    towers = [_tower(*of_tower, freeze, seed) for of_tower in described]
    return [{key: entry[key] for key in ("type", "integration", "connector")} for entry in entries], towers


def _checked(entry: Any) -> dict[str, Any]:
    """Return an entry in which nothing is unknown, its connector as a config has it."""
    if not isinstance(entry, dict):
        raise TypeError(f"an entry of encoders must be a dict, got {type(entry).__name__}")
    unknown = [key for key in entry if key not in KEYS]
    if unknown or "type" not in entry:
        got = ", ".join(map(repr, unknown)) or "no 'type'"
        raise ValueError(f"an entry of encoders must have 'type', and may have {', '.join(KEYS[1:])}, got {got}")
    types = entry["type"] if isinstance(entry["type"], list | tuple) else [entry["type"]]
    if not types or any(not isinstance(name, str) or name not in TOWERS for name in types):
        raise ValueError(f"an encoder's type must be {', '.join(TOWERS)}, or a list of them, got {entry['type']!r}")
    known = {"type": entry["type"], "integration": entry.get("integration", "lal")}
    known["connector"] = _connector(entry.get("connector", {"type": "mlp"}))
    outline_connectors([complete_entry(known)])  # says what is wrong with it before any weights are read
    return {**entry, **known}


def _one_each(entry: dict[str, Any], name: str, count: int, several: bool) -> list[Any]:
    """Return what an entry has under a name for each of its towers: None where it has nothing."""
    value = entry.get(name)
    values = (
        [None] * count if value is None else list(value) if several and isinstance(value, list | tuple) else [value]
    )
    if len(values) != count:
        raise ValueError(f"{name} must be a list of one for each of {entry['type']}, got {value!r}")
    return values


def check_tower(tower_type: str, has_checkpoint: bool, config: dict[str, Any]) -> None:
    """Check an encoder's config without its weights.

    Args:
        tower_type: Its type.
        has_checkpoint: whether a checkpoint gives its shape.
        config: as an entry has it.

    Raises:
        TypeError, ValueError: a setting is unknown, or none that such an encoder can have.
    """
    if has_checkpoint:
        beside = set(inspect.signature(TOWERS[tower_type].from_checkpoint).parameters) - {"path", "freeze"}
        if not set(config) <= beside:
            held = f"hold {' and '.join(sorted(beside))} alone" if beside else "be None"
            raise ValueError(f"config must {held} where a checkpoint says it, got {config!r}")
    if "freeze" in config:
        raise ValueError(f"config must not say freeze, as freeze_encoders does, got {config!r}")
    with torch.device("meta"):
        TOWERS[tower_type](**config)


def _tower(tower_type: str, checkpoint: Any, config: Any, freeze: bool, seed: int) -> Tower:
    if checkpoint is None:
        return TOWERS[tower_type](**{"seed": seed, **(config or {}), "freeze": freeze})
    return TOWERS[tower_type].from_checkpoint(checkpoint, freeze=freeze, **(config or {}))


def _connector(connector: Any) -> dict[str, Any]:
    """Return a connector's entry in a config: its settings apart from its type."""
    if not isinstance(connector, dict) or "type" not in connector:
        raise ValueError(f'connector must be a dict with its "type" and its settings, got {connector!r}')
    return {"type": connector["type"], "config": {key: value for key, value in connector.items() if key != "type"}}
