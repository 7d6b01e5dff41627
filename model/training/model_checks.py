"""What is wrong with a model's settings, told before any weights are read: the parts are built without values."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import LlamaConfig

from palkernels.errors import one_line
from palkernels.model.building.encoders import check_tower
from palkernels.model.building.layers import parse_layers
from palkernels.model.causal_lm.flamingo import attach_flamingo
from palkernels.model.causal_lm.gated_layer import FlamingoConfig
from palkernels.model.connectors.registry import CONNECTORS
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.configuration_pal import PalConfig, complete_entry
from palkernels.model.pal.parts import outline_connectors
from palkernels.model.training.fields import Fields
from palkernels.model.training.located import did_you_mean

__all__ = ["check_connector", "check_encoder", "check_settings", "damaged_weights"]

ANY_DEPTH = 1000  # of a language model that is not here: no layer of it is refused


def check_connector(connector: Fields, types: Any, name: str) -> None:
    """Find fault with a connector's settings.

    Args:
        connector: The settings, and its type.
        types: Of the encoder, or a list of those that it fuses; None: there is a fault in them.
        name: Its type.
    """
    parameters = inspect.signature(CONNECTORS[name].__init__).parameters
    widths = ("self", "input_size", "input_sizes", "hidden_size")
    known = [one for one in parameters if one not in widths]
    settings = {key: item.plain() for key, item in connector.items.items() if key != "type"}
    for key in [key for key in settings if key not in known]:
        hint = did_you_mean(key, known) if known else f": {name} has no settings"
        connector.fault(connector.items[key], f"{connector.named(key)} is not known{hint}")
        del settings[key]

    def build(config: dict[str, Any]) -> None:
        outline_connectors([complete_entry({"type": types, "connector": {"type": name, "config": config}})])

    if types is not None:
        _find_fault(connector, build, settings)


def check_encoder(config: Fields, tower_type: str, has_checkpoint: bool) -> None:
    """Find fault with an encoder's ``config``."""
    settings = {key: item.plain() for key, item in config.items.items()}
    if has_checkpoint:
        beside = set(inspect.signature(TOWERS[tower_type].from_checkpoint).parameters) - {"path", "freeze"}
        for key in [key for key in settings if key not in beside]:
            known = f"it may be {' or '.join(sorted(beside))}" if beside else "there is none"
            config.fault(config.items[key], f"{config.named(key)} is said by the checkpoint; beside one {known}")
            del settings[key]
    _find_fault(config, lambda chosen: check_tower(tower_type, has_checkpoint, chosen), settings)


def check_settings(model: Fields, settings: dict[str, Any], encoders: list[dict[str, Any]], llm: str | None) -> None:
    """Find fault with PalConfig's settings.

    Args:
        model: The recipe's model.
        settings: Those that it has.
        encoders: Entries of ``build``, in which there is no fault.
        llm: The language model, of which a directory says how deep it is.
    """
    depth = _depth(llm)
    entries = []
    for entry in encoders:
        connector = {name: value for name, value in entry["connector"].items() if name != "type"}
        described = {"type": entry["connector"]["type"], "config": connector}
        entries.append({"type": entry["type"], "integration": entry["integration"], "connector": described})

    def build(chosen: dict[str, Any]) -> None:
        layers = parse_layers(chosen.get("layers", "all"), depth)
        text = LlamaConfig(num_hidden_layers=depth)
        PalConfig(text_config=text, encoders=entries, audio_token_id=0, **{**chosen, "layers": layers})

    _find_fault(model, build, settings)
    if isinstance(settings.get("flamingo"), dict):
        known = [name for name in inspect.signature(attach_flamingo).parameters if name != "model"]
        flamingo = Fields(model.items["flamingo"], model.named("flamingo"), model.faults, known)
        own = {key: item.plain() for key, item in flamingo.items.items() if key in known}
        _find_fault(flamingo, lambda chosen: _check_flamingo(chosen, depth), own)


def damaged_weights(path: Path) -> str | None:
    """Return which safetensors file at a path is not whole, and why; None: none is."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] * (path.suffix == ".safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # reads the header, and how long the file must be
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name}: {one_line(error, with_type=True)}"
    return None


def _find_fault(fields: Fields, build: Callable[[dict[str, Any]], None], settings: dict[str, Any]) -> None:
    """Add what is wrong with settings: that with which they cannot be built, each with its key."""
    for key, message in _faults(build, settings):
        if key is None:
            fields.fault(fields.tree, f"{fields.path} must be of settings that go together, got: {message}")
        else:
            fields.wrong(key, message)


def _faults(build: Callable[[dict[str, Any]], None], settings: dict[str, Any]) -> Iterator[tuple[str | None, str]]:
    """Yield keys of settings and what is wrong with them, until the others can be built; None: with all together."""
    remaining = dict(settings)
    while (error := _error(build, remaining)) is not None:
        first, _, rest = one_line(error).partition(" ")
        if first in remaining:
            key: str | None = first
        else:  # the one without which there is another fault, or none
            said = one_line(error, with_type=not isinstance(error, ValueError))
            rest = f"must be one that can be built, got {said}"
            key = next(
                (name for name in remaining if str(_error(build, _without(remaining, name))) != str(error)), None
            )
        yield key, one_line(error) if key is None else rest
        if key is None:
            return
        del remaining[key]


def _error(build: Callable[[dict[str, Any]], None], settings: dict[str, Any]) -> Exception | None:
    try:
        build(settings)
    except Exception as error:  # a value of another type makes a constructor raise anything
        return error
    return None


def _without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


def _check_flamingo(settings: dict[str, Any], depth: int) -> None:
    usual: dict[str, Any] = {"heads": 1, "head_dim": 1}  # else those of the language model
    parameters = inspect.signature(attach_flamingo).parameters
    usual |= {name: one.default for name, one in parameters.items() if name != "model" and name not in usual}
    config = FlamingoConfig(**{**usual, **settings})
    if config.every > depth:
        raise ValueError(f"every must be at most the language model's {depth} layers, got {config.every}")


def _depth(llm: str | None) -> int:
    """Return how many layers a language model has whose directory says it."""
    try:
        config = json.loads((Path(llm or "") / "config.json").read_text(encoding="utf-8"))
        depth = config.get("text_config", config)["num_hidden_layers"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ANY_DEPTH  # of a hub, or in a .gguf file
    return depth if isinstance(depth, int) else ANY_DEPTH
