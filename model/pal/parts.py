"""Towers and connectors as a :class:`PalConfig` has them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from palkernels.model.connectors.base import CONNECTORS, Connector
from palkernels.model.encoders.towers import TOWERS, Tower
from palkernels.model.pal.clips import Clips
from palkernels.model.pal.configuration_pal import PalConfig


def tower_types(entry: dict[str, Any]) -> list[str]:
    """The types of an entry's towers: one, or two for LFST."""
    return [entry["type"]] if isinstance(entry["type"], str) else list(entry["type"])


def tower_settings(encoders: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Type and config of every tower of a config's entries."""
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in encoders:
        configs = entry["config"] if isinstance(entry["config"], list) else [entry["config"]]
        found += zip(tower_types(entry), configs, strict=True)
    return found


def with_configs(encoders: Sequence[dict[str, Any]], towers: Sequence[nn.Module | None] | None) -> list[dict[str, Any]]:
    """Entries whose ``config`` is that of the tower that is given."""
    found, rest = [], list(towers or [])
    for entry in encoders:
        count = len(tower_types(entry)) if isinstance(entry, dict) and "type" in entry else 1
        given, rest = rest[:count], rest[count:]
        if any(tower is not None for tower in given):
            configs = [dict(getattr(tower, "config", {})) for tower in given]
            for config in configs:
                config.pop("freeze", None)  # PalConfig.freeze_encoders says it
            entry = {**entry, "config": configs if isinstance(entry["type"], list | tuple) else configs[0]}
        found.append(entry)
    return found


def build_towers(config: PalConfig, given: Sequence[nn.Module | None] | None = None) -> list[Tower]:
    """All towers of a config, in its order; ``given`` ones are taken instead of new ones."""
    wanted = tower_settings(config.encoders)
    given = [None] * len(wanted) if given is None else given
    if len(given) != len(wanted):
        raise ValueError(f"towers must be {len(wanted)}, each a module or None, got {len(given)}")
    found: list[Tower] = []
    for (kind, settings), tower in zip(wanted, given, strict=True):
        if tower is None:
            tower = TOWERS[kind](**{**settings, "freeze": config.freeze_encoders})
        elif not isinstance(tower, TOWERS[kind]):
            raise TypeError(f"a tower must be a {TOWERS[kind].__name__}, got {type(tower).__name__}")
        elif tower.config["freeze"] != config.freeze_encoders:
            raise ValueError(f"towers must have freeze={config.freeze_encoders} as freeze_encoders says, got another")
        found.append(tower)
    return found


def build_connectors(config: PalConfig, towers: Sequence[nn.Module]) -> list[Connector]:
    """One connector per entry of a config, from its towers' width to the language model's."""
    found, rest = [], list(towers)
    for entry in config.encoders:
        count = len(tower_types(entry))
        own, rest = rest[:count], rest[count:]
        sizes: list[Any] = [tower.hidden_size for tower in own]
        found.append(_connector(entry, sizes, config.text_config.hidden_size))
    return found


def connect(connector: Connector, states: Sequence[Tensor], lengths: Tensor | None) -> Clips:
    """An entry's encoded clips, one tensor per tower, through its connector; ``lengths`` (C, towers)."""
    dtype = next(x.dtype for x in connector.parameters() if x.is_floating_point())
    given = tuple(x.to(dtype) for x in states)
    first = None if lengths is None else lengths[:, 0]
    out, valid = connector.connect(given if len(given) > 1 else given[0], first)
    if valid is None:
        valid = torch.full(out.shape[:1], out.shape[1], device=out.device)
    return Clips(out, valid)


def outline_connectors(encoders: Sequence[dict[str, Any]]) -> list[Connector]:
    """The connectors of a config's entries without weights, their widths made up: they know how many states they make
    of how many."""
    with torch.device("meta"):
        return [_connector(entry, [1] * len(tower_types(entry)), 1) for entry in encoders]


def _connector(entry: dict[str, Any], sizes: list[int], width: int) -> Connector:
    widths = {"input_sizes": sizes} if len(sizes) > 1 else {"input_size": sizes[0]}
    settings = entry["connector"]["config"]
    return CONNECTORS[entry["connector"]["type"]](**{**widths, "hidden_size": width, **settings})
