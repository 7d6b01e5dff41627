"""The file of what an attached model has beyond the stock one: settings, connector, per-layer projectors.

It is a safetensors file, whose metadata says how to build the modules and for which model they were made.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels.errors import one_line
from palkernels.model.causal_lm.audio_parts import CONNECTOR, NAME
from palkernels.model.causal_lm.config import LalConfig
from palkernels.model.causal_lm.layers import head_dim_of

FILE_NAME = "lal.safetensors"
METADATA = "palkernels"
FORMAT = 1


def buildable() -> dict[str, type[nn.Module]]:
    """Return the classes of modules that a file can rebuild, by name."""
    from palkernels.model.connectors.registry import CONNECTORS  # attach alone needs no connector

    return {module_class.__name__: module_class for module_class in (*CONNECTORS.values(), nn.Linear)}


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Return what must agree between the model that a file was saved with and the one that loads it."""
    config = model.config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": head_dim_of(config),
    }


def save(
    directory: str | os.PathLike[str],
    model: PreTrainedModel,
    config: LalConfig,
    connector: nn.Module | None,
    projectors: Mapping[int, nn.Module] | None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``directory/lal.safetensors``, whole or not at all, and return its path.

    Args:
        state_dict: the model's, from which the weights are taken; None: from the modules.

    Raises:
        ValueError: a module holds peft's adapters, or the state dict lacks its weights.
    """
    modules = named_modules(connector, projectors)
    states = {name: _weights(name, module, state_dict) for name, module in modules.items()}
    settings = {
        "format": FORMAT,
        "model": fingerprint(model),
        "config": asdict(config),
        "modules": {name: _describe(module) for name, module in modules.items()},
    }
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous().clone()
        for name, weights in states.items()
        for key, tensor in weights.items()
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=folder, prefix=FILE_NAME)
    os.close(descriptor)
    try:
        save_file(tensors, part, metadata={METADATA: json.dumps(settings)})
        os.replace(part, folder / FILE_NAME)
    except BaseException:
        os.unlink(part)
        raise
    return folder / FILE_NAME


@dataclass(frozen=True)
class Saved:
    """What :func:`load` has read: settings, and modules that do not hold the saved weights before :meth:`fill`."""

    config: LalConfig
    connector: nn.Module | None
    projectors: dict[int, nn.Module] | None
    states: dict[str, dict[str, Tensor]]  # by the module's name

    def fill(self) -> None:
        """Load the saved weights into the modules."""
        for name, module in named_modules(self.connector, self.projectors).items():
            module.load_state_dict(self.states[name])


def load(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    connector: nn.Module | None,
    projectors: Mapping[int, nn.Module] | None,
) -> Saved:
    """Read a file that :func:`save` wrote; modules that it cannot build must be given.

    Raises:
        ValueError: no such file, another model, or modules that do not fit.
    """
    path = Path(directory) / FILE_NAME
    settings, tensors = _read(path)
    ours, theirs = fingerprint(model), settings["model"]
    differ = [f"{name} {theirs.get(name)!r}" for name in ours if ours[name] != theirs.get(name)]
    if differ:
        raise ValueError(f"the model must be like the one saved in {path}, {', '.join(differ)}, got {ours}")
    callers = named_modules(connector, projectors)
    unknown = sorted(set(callers) - set(settings["modules"]))
    if unknown:
        raise ValueError(f"modules must be in {path}, got {', '.join(unknown)}")
    modules: dict[str, Any] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, description in settings["modules"].items():
        states[name] = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
        modules[name] = callers.get(name)
        if modules[name] is None:
            dtype = next(iter(states[name].values())).dtype
            modules[name] = _build(path, name, description).to(device=model.device, dtype=dtype)
        shapes = {key: tuple(x.shape) for key, x in modules[name].state_dict().items()}
        saved = {key: tuple(x.shape) for key, x in states[name].items()}
        if shapes != saved:
            raise ValueError(f"{name} must have the tensors saved in {path}, {saved}, got {shapes}")
    per_layer = {int(name.rpartition(".")[2]): module for name, module in modules.items() if name != CONNECTOR}
    return Saved(LalConfig(**settings["config"]), modules.get(CONNECTOR), per_layer or None, states)


def named_modules(connector: nn.Module | None, projectors: Mapping[int, nn.Module] | None) -> dict[str, nn.Module]:
    """Return the modules by their names in a file."""
    modules = {} if connector is None else {CONNECTOR: connector}
    return modules | {f"projectors.{layer}": module for layer, module in (projectors or {}).items()}


def _weights(name: str, module: nn.Module, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return a module's weights, gathered where they are sharded."""
    weights = module.state_dict()
    if any(".base_layer." in f".{key}" for key in weights):
        raise ValueError(f"{name} must hold no adapters to be saved: peft's merge_and_unload() merges them")
    keys = {key: f"{NAME}.{name}.{key}" for key in weights}
    if state_dict is not None and not state_dict.keys().isdisjoint(keys.values()):  # a stock one has none of them
        missing = sorted(set(keys.values()) - state_dict.keys())
        if missing:
            raise ValueError(f"state_dict must hold the weights of the {name}, got none for {', '.join(missing)}")
        weights = {key: state_dict[full] for key, full in keys.items()}
    return {key: x.full_tensor() if hasattr(x, "full_tensor") else x for key, x in weights.items()}


def _describe(module: nn.Module) -> dict[str, Any]:
    """Return a module's class and, where a file can rebuild it, the arguments."""
    name = type(module).__name__
    arguments: dict[str, Any] | None = None
    if type(module) is nn.Linear:
        arguments = {"in_features": module.in_features, "out_features": module.out_features}
        arguments["bias"] = module.bias is not None
    elif buildable().get(name) is type(module):
        arguments = module.config  # type: ignore[assignment]
    return {"class": name, "arguments": arguments}


def _build(path: Path, name: str, description: dict[str, Any]) -> nn.Module:
    classes = buildable()
    if description["arguments"] is None or description["class"] not in classes:
        raise ValueError(f"{name} must be given to attach: {path} holds the weights of a {description['class']} only")
    return classes[description["class"]](**description["arguments"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            settings: dict[str, Any] = json.loads((file.metadata() or {})[METADATA])
            if settings["format"] != FORMAT:
                raise ValueError(f"format {settings['format']}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it cannot be iterated)
            return {name: settings[name] for name in ("model", "config", "modules")}, tensors
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = one_line(error, with_type=True)
        raise ValueError(f"{path} must be a file that handle.save wrote, got {reason}") from error
