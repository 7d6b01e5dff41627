"""The part of a recipe that says what is trained: a saved model, or the parts of a new one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import is_gguf_available

from palkernels.errors import one_line
from palkernels.model.connectors.registry import CONNECTORS
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.training import fields as take
from palkernels.model.training.fields import Fields
from palkernels.model.training.located import Located, did_you_mean
from palkernels.model.training.model_checks import check_connector, check_encoder, check_settings, damaged_weights

__all__ = ["ModelRecipe", "read_model"]

INTEGRATIONS = ("lal", "plits", "flamingo")
NOT_SETTINGS = ("text_config", "encoders", "audio_token_id", "freeze_encoders", "freeze_ffn")  # others say these
SETTINGS = tuple(
    {one.name: None for one in fields(PalConfig) if one.name not in {x.name for x in fields(PreTrainedConfig)}}
)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelRecipe:
    """A saved model's directory as ``path``; or parts, as ``palkernels.model.building.build`` takes them.

    ``settings`` are PalConfig's, which a saved model brings with it. ``dtype``: that of the weights that are kept;
    None: the checkpoint's own.
    """

    path: str | None = None
    llm: str | None = None
    encoders: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    def why_not(self, part: str) -> str | None:
        """Return why the model has no such part to train; None if it has, or if that cannot be told yet."""
        settings, integrations = self.settings, {entry.get("integration", "lal") for entry in self.encoders}
        if self.path is not None:
            try:
                settings = json.loads((Path(self.path) / "config.json").read_text(encoding="utf-8"))
                integrations = {entry["integration"] for entry in settings["encoders"]}
            except (OSError, ValueError, KeyError, TypeError):
                return None  # of a hub, or what read_model has found fault with
        if part == "projectors" and settings.get("projection", "shared") != "per_layer":
            return "projectors are there with projection: per_layer"
        if part == "flamingo" and "flamingo" not in integrations:
            return "no encoder has integration: flamingo"
        return None


def read_model(top: Fields, faults: list[str]) -> ModelRecipe | None:
    """Return what a recipe says under "model"; None where it says nothing of use."""
    if not top.has("model"):
        top.wrong("model", "must be given, got nothing: a saved model's directory, or llm and encoders")
        return None
    tree = top.items["model"]
    if not isinstance(tree.value, dict):
        tree = Located({"path": tree}, tree.place, tree.folder)
    settings = [name for name in SETTINGS if name not in NOT_SETTINGS]
    model = Fields(tree, "model", faults, ["path", "llm", "encoders", "dtype", *settings])
    dtype = model.read("dtype", take.choice(*DTYPES), None)
    given = [name for name in ("llm", "encoders", *settings) if model.has(name)]
    if model.has("path"):
        if given:
            model.wrong(given[0], "must not be given with a saved model's path, which says it")
        path = model.read("path", take.path_or_name)
        if path is not None and Path(path).exists() and (reason := _not_a_model(Path(path))):
            model.wrong("path", f"must be a saved audio LLM's directory, got {path!r}, {reason}")
        _whole(model, "path", path)
        return ModelRecipe(path=path, dtype=dtype)
    llm = model.read("llm", take.path_or_name)
    if llm is not None and llm.endswith(".gguf") and not is_gguf_available():
        model.wrong("llm", f"must be a file that can be read, got {llm!r}: pip install 'palkernels[demo]' reads .gguf")
    _whole(model, "llm", llm)
    if not model.has("encoders"):
        model.wrong("encoders", "must be given, got nothing: [{type: whisper, checkpoint: DIRECTORY}], say")
        return ModelRecipe(llm=llm, dtype=dtype)
    entries = take.items(model.items["encoders"])
    if not entries:
        model.wrong("encoders", "must hold at least one encoder, got none")
    before = len(faults)
    encoders = [_encoder(entry, f"model.encoders.{i}", faults) for i, entry in enumerate(entries)]
    chosen = {name: model.items[name].plain() for name in settings if model.has(name)}
    if len(faults) == before:
        check_settings(model, chosen, encoders, llm)
    return ModelRecipe(None, llm, tuple(encoders), chosen, dtype)


def _whole(entry: Fields, name: str, path: str | None) -> None:
    """Find fault with a directory, or file, of weights that is damaged."""
    damage = None if path is None else damaged_weights(Path(path))
    if damage is not None:
        entry.wrong(name, f"must hold whole files of weights, got {path!r} with {damage}")


def _not_a_model(path: Path) -> str | None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"whose config.json cannot be read: {one_line(error)}"
    if not isinstance(config, dict) or config.get("model_type") != "pal":
        kind = config.get("model_type") if isinstance(config, dict) else None
        return f"a model of type {kind!r}: give it as llm, with encoders"
    return None


def _encoder(tree: Located, path: str, faults: list[str]) -> dict[str, Any]:
    """Return an entry of ``build``'s ``encoders``."""
    entry = Fields(tree, path, faults, ("type", "checkpoint", "config", "integration", "connector"))
    if not isinstance(tree.value, dict):
        return {}
    types = entry.read("type", take.texts) or ()
    several = entry.has("type") and isinstance(tree.value["type"].value, list)
    for name in types:
        if name not in TOWERS:
            entry.wrong("type", f"must be an encoder, got {name!r}{did_you_mean(name, TOWERS)}")
    checkpoint: Any = None
    if entry.has("checkpoint"):
        written = tree.value["checkpoint"]
        try:
            paths = [None if item.value is None else take.path_or_name(item) for item in take.items(written)]
            checkpoint = paths if isinstance(written.value, list) else paths[0]
            for path_of_one in paths:
                _whole(entry, "checkpoint", path_of_one)
        except ValueError as error:
            entry.wrong("checkpoint", str(error))
    of_type = list(types) if several else types[0] if types else ""
    is_known = bool(types) and all(name in TOWERS for name in types)
    connector = _connector(entry, of_type if is_known else None, faults)
    own = {"config": entry.items["config"].plain()} if entry.has("config") else {}
    if is_known and entry.has("config"):
        _configs(entry, types, checkpoint, faults)
    return {
        **own,
        "type": of_type,
        "checkpoint": checkpoint,
        "integration": entry.read("integration", take.choice(*INTEGRATIONS), "lal"),
        "connector": connector,
    }


def _configs(entry: Fields, types: Sequence[str], checkpoint: Any, faults: list[str]) -> None:
    """Find fault with the config of an encoder, or with those of several that a connector fuses."""
    tree, path = entry.items["config"], entry.named("config")
    several = isinstance(tree.value, list)
    trees = tree.value if several else [tree]
    checkpoints = checkpoint if isinstance(checkpoint, list) else [checkpoint] * len(types)
    if len(trees) != len(types):
        entry.wrong("config", f"must be one for each of {', '.join(types)}, got {len(trees)}")
        return
    for i, (tower_type, one) in enumerate(zip(types, trees, strict=True)):
        if one.value is not None:
            config = Fields(one, f"{path}.{i}" if several else path, faults, None)
            check_encoder(config, tower_type, i < len(checkpoints) and checkpoints[i] is not None)


def _connector(entry: Fields, types: Any, faults: list[str]) -> dict[str, Any]:
    if not entry.has("connector"):
        return {"type": "mlp"}
    tree = entry.items["connector"]
    if not isinstance(tree.value, dict):
        tree = Located({"type": tree}, tree.place, tree.folder)
    connector = Fields(tree, entry.named("connector"), faults, None)
    name = connector.read("type", take.text)
    if name is not None and name not in CONNECTORS:
        connector.wrong("type", f"must be a connector, got {name!r}{did_you_mean(name, CONNECTORS)}")
    elif name is not None:
        check_connector(connector, types, name)
    return {key: item.plain() for key, item in connector.items.items()}
