"""Towers and connectors as the ``encoders`` of a :class:`PalConfig` describe them.

An entry of ``encoders`` has one tower, or several where its connector fuses them. Things that are listed tower by
tower, such as features and lengths, are dealt out to the entries by :func:`by_entry`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels.errors import one_line
from palkernels.model.connectors.base import Connector, States, cut_paddings
from palkernels.model.connectors.registry import CONNECTORS
from palkernels.model.encoders.base import Tower
from palkernels.model.encoders.registry import TOWERS
from palkernels.model.pal.clips import Clips
from palkernels.model.pal.configuration_pal import TOKEN_IDS, PalConfig, attention_by_part

__all__ = [
    "build_connectors",
    "build_towers",
    "by_entry",
    "check_room",
    "check_settings",
    "choose_attention",
    "connect",
    "entries_with_tower_configs",
    "keep_weights",
    "outline_connectors",
    "reset_weights",
    "tower_settings",
    "with_attention_of_encoders",
    "without_padding",
]  # fmt: skip

Item = TypeVar("Item")


def tower_types(entry: dict[str, Any]) -> list[str]:
    """Return the types of an entry's towers: one, or all that its connector fuses."""
    return [entry["type"]] if isinstance(entry["type"], str) else list(entry["type"])


def tower_settings(encoders: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return type and config of every tower of all entries."""
    settings: list[tuple[str, dict[str, Any]]] = []
    for entry in encoders:
        configs = entry["config"] if isinstance(entry["config"], list) else [entry["config"]]
        settings += zip(tower_types(entry), configs, strict=True)
    return settings


def by_entry(
    encoders: Sequence[dict[str, Any]], items: Sequence[Item]
) -> Iterator[tuple[dict[str, Any], Sequence[Item]]]:
    """Yield each entry with its share of ``items``, of which there is one for every tower."""
    first = 0
    for entry in encoders:
        last = first + len(tower_types(entry))
        yield entry, items[first:last]
        first = last


def entries_with_tower_configs(
    encoders: Sequence[dict[str, Any]], towers: Sequence[nn.Module | None] | None
) -> list[dict[str, Any]]:
    """Return the entries with the ``config`` of every tower that is given, instead of their own.

    The entries are a caller's and not checked yet: what is wrong with them, :class:`PalConfig` says.
    """
    entries, remaining = [], list(towers or [])
    for entry in encoders:
        count = len(tower_types(entry)) if isinstance(entry, dict) and "type" in entry else 1
        entry_towers, remaining = remaining[:count], remaining[count:]
        if any(tower is not None for tower in entry_towers):
            configs = [dict(getattr(tower, "config", {})) for tower in entry_towers]
            for config in configs:
                config.pop("freeze", None)  # PalConfig.freeze_encoders says it
            entry = {**entry, "config": configs if isinstance(entry["type"], list | tuple) else configs[0]}
        entries.append(entry)
    return entries


def build_towers(config: PalConfig, towers: Sequence[nn.Module | None] | None = None) -> list[Tower]:
    """Return all towers of a config, in its order.

    Args:
        config: The config.
        towers: Towers to take instead of new ones; None in the place of a tower that is to be built.

    Raises:
        TypeError, ValueError: There are too few or too many towers, or one does not fit the config.
    """
    settings_of_towers = tower_settings(config.encoders)
    towers = [None] * len(settings_of_towers) if towers is None else towers
    if len(towers) != len(settings_of_towers):
        raise ValueError(f"towers must be {len(settings_of_towers)}, each a module or None, got {len(towers)}")
    built: list[Tower] = []
    for (tower_type, settings), tower in zip(settings_of_towers, towers, strict=True):
        tower_class = TOWERS[tower_type]
        if tower is None:
            tower = tower_class(**{**settings, "freeze": config.freeze_encoders})
        elif not isinstance(tower, tower_class):
            name = tower_class.__name__
            raise TypeError(f"a tower must be a {name}, got {type(tower).__name__}: {name}.from_checkpoint makes one")
        elif tower.config["freeze"] != config.freeze_encoders:
            raise ValueError(f"towers must have freeze={config.freeze_encoders} as freeze_encoders says, got another")
        else:
            keep_weights(tower)
        built.append(tower)
    set_attention(built, config.encoders_attn_implementation)
    return built


def build_connectors(config: PalConfig, towers: Sequence[Tower]) -> list[Connector]:
    """Return one connector per entry of a config, from its towers' width to the language model's."""
    width = config.text_config.hidden_size
    connectors = [
        _build_connector(entry, [tower.hidden_size for tower in entry_towers], width)
        for entry, entry_towers in by_entry(config.encoders, towers)
    ]
    set_attention(connectors, config.encoders_attn_implementation)
    return connectors


def outline_connectors(encoders: Sequence[dict[str, Any]]) -> list[Connector]:
    """Return the entries' connectors without weights, their widths made up: they know how many states they make of how
    many."""
    with torch.device("meta"):
        return [_build_connector(entry, [1] * len(tower_types(entry)), 1) for entry in encoders]


def _build_connector(entry: dict[str, Any], input_sizes: list[int], hidden_size: int) -> Connector:
    widths: dict[str, Any] = {"input_sizes": input_sizes} if len(input_sizes) > 1 else {"input_size": input_sizes[0]}
    settings = entry["connector"]["config"]
    return CONNECTORS[entry["connector"]["type"]](**{**widths, "hidden_size": hidden_size, **settings})


def check_room(token: Any, language_model: PreTrainedModel) -> None:
    """Raise a ValueError if a language model has no embedding for the audio token."""
    vocabulary = language_model.config.get_text_config().vocab_size
    if isinstance(token, int) and token >= vocabulary:
        raise ValueError(
            f"audio_token_id must be from 0 to {vocabulary - 1}, got {token}: "
            "language_model.resize_token_embeddings(len(tokenizer)) makes room for a token that was added"
        )


def check_settings(settings: dict[str, Any]) -> None:
    """Check the names of a config's settings, of which :class:`PalConfig` keeps any, as transformers' configs do.

    Raises:
        TypeError: one is not among its arguments.
    """
    known = {field.name for field in fields(PalConfig)} | {"attn_implementation", *TOKEN_IDS}
    if unknown := sorted(set(settings) - known):
        raise TypeError(f"settings must be arguments of PalConfig, got {', '.join(map(repr, unknown))}")


def with_attention_of_encoders(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a config's settings, whose ``attn_implementation`` asks nothing of a language model that is there already,
    and what it asks of all parts: a config would change the language model before another part refuses.
    """
    names = attention_by_part(settings.get("attn_implementation") or {})
    settings = {name: value for name, value in settings.items() if name != "attn_implementation"}
    return settings | ({"attn_implementation": {"encoders": names["encoders"]}} if "encoders" in names else {}), names


def choose_attention(
    model: PreTrainedModel,
    language_model: PreTrainedModel,
    parts: Sequence[Tower | Connector],
    attn_implementation: Any,
    allow_all_kernels: bool = False,
) -> None:
    """Let the parts of a model attend as ``attn_implementation`` of :class:`PalConfig` says.

    Raises:
        ValueError, ImportError: A part has no such implementation. All of them attend as before.
    """
    names, config = attention_by_part(attn_implementation), model.config
    if not names:
        return
    own = names.get("", config._attn_implementation)
    own = model._check_and_adjust_attn_implementation(own, allow_all_kernels=allow_all_kernels)
    before = [part.attn_implementation for part in parts]
    set_attention(parts, names.get("encoders"))
    if "text_config" in names:
        try:
            language_model.set_attn_implementation(names["text_config"], allow_all_kernels=allow_all_kernels)
        except (ValueError, ImportError):
            _set_each(parts, before)
            raise
    config._attn_implementation_internal = own
    config._encoders_attn_implementation = names.get("encoders", config.encoders_attn_implementation)


def set_attention(parts: Sequence[Tower | Connector], attn_implementation: str | None) -> None:
    """Let towers and connectors attend as transformers names it; None: as they do.

    Raises:
        ValueError: A part has no such implementation. All of them attend as before.
    """
    before = [part.attn_implementation for part in parts]
    for part in parts if attn_implementation is not None else ():
        try:
            part.set_attn_implementation(attn_implementation)  # type: ignore[arg-type]
        except (ValueError, ImportError) as error:
            _set_each(parts, before)
            raise ValueError(
                f"attn_implementation must be one that {type(part).__name__} has, got {attn_implementation!r}: "
                f'{one_line(error)}; {{"text_config": {attn_implementation!r}}} is the language model\'s alone'
            ) from error


def _set_each(parts: Sequence[Tower | Connector], names: Sequence[str | None]) -> None:
    for part, name in zip(parts, names, strict=True):
        if name is not None:
            part.set_attn_implementation(name)


def without_padding(
    encoders: Sequence[dict[str, Any]], encoded: Sequence[Tensor], lengths: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return every tower's states for the connectors, cut to the longest clip by ``cut_paddings``.

    Args:
        encoders: The entries of a config.
        encoded: (C, N, width) of every tower.
        lengths: (C,) valid states of every tower; None: all.
    """
    entry_states: list[States] = [tuple(states) for _, states in by_entry(encoders, encoded)]
    entry_lengths = [valid[0] for _, valid in by_entry(encoders, lengths)]
    return [states for entry in cut_paddings(entry_states, entry_lengths) for states in entry]


def connect(connector: Connector, states: Sequence[Tensor], lengths: Tensor | None) -> Clips:
    """Pass an entry's encoded clips through its connector.

    Args:
        connector: The entry's.
        states: (C, N, width) of each of its towers.
        lengths: (C,) valid states of the first tower; None: all.
    """
    dtype = next(weight.dtype for weight in connector.parameters() if weight.is_floating_point())
    inputs = tuple(tower_states.to(dtype) for tower_states in states)
    outputs, valid = connector.connect(inputs if len(inputs) > 1 else inputs[0], lengths)
    if valid is None:
        valid = torch.full(outputs.shape[:1], outputs.shape[1], device=outputs.device)
    return Clips(outputs, valid)


def keep_weights(part: nn.Module) -> None:
    """Mark a part's weights as they are, so that transformers' ``post_init`` does not draw them anew."""
    for module in part.modules():
        if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            module._is_hf_initialized = True  # type: ignore[assignment]


def reset_weights(module: nn.Module) -> bool:
    """Let a module draw its own weights as its constructor does, but for those of a checkpoint.

    Returns:
        Whether it can: False where it has weights to draw and no ``reset_parameters``.
    """
    whole = isinstance(module, Tower)  # a tower's weights come from its seed together
    own = [*module.parameters(recurse=whole), *module.buffers(recurse=whole)]
    if all(getattr(tensor, "_is_hf_initialized", False) for tensor in own):
        return True
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    return reset is not None
