"""What an attached model has beyond the stock one, in one file: settings, connector, per-layer projectors.

The file is safetensors; its metadata says how to build the modules and which model they were made for.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from palkernels.model.causal_lm.attach import LalHandle

FILE_NAME = "lal.safetensors"
METADATA = "palkernels"
FORMAT = 1
CONNECTOR = "connector"


def buildable() -> dict[str, type[nn.Module]]:
    """Return the classes of modules that a file can rebuild, by name."""
    from palkernels.model.connectors.registry import CONNECTORS  # attach alone needs no connector

    return {module_class.__name__: module_class for module_class in (*CONNECTORS.values(), nn.Linear)}


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What must agree between the model that was saved with and the one that is loaded into."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": head_dim,
    }


def save(handle: "LalHandle", directory: str | os.PathLike[str]) -> Path:
    """Write ``directory/lal.safetensors``, whole or not at all, and return its path."""
    modules = named_modules(handle.connector, handle.projectors)
    settings = {
        "format": FORMAT,
        "model": fingerprint(handle.model),
        "config": asdict(handle.config),
        "modules": {name: _describe(module) for name, module in modules.items()},
    }
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous().clone()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
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
    """What :func:`load` found: settings, and modules that do not hold the saved weights before :meth:`fill`."""

    config: dict[str, Any]  # LalConfig's arguments
    connector: nn.Module | None
    projectors: dict[int, nn.Module] | None
    states: dict[str, dict[str, Tensor]]  # by the module's name

    def fill(self) -> None:
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
    given = named_modules(connector, projectors)
    unknown = sorted(set(given) - set(settings["modules"]))
    if unknown:
        raise ValueError(f"modules must be in {path}, got {', '.join(unknown)}")
    modules: dict[str, Any] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, description in settings["modules"].items():
        states[name] = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
        modules[name] = given.get(name)
        if modules[name] is None:
            dtype = next(iter(states[name].values())).dtype
            modules[name] = _build(path, name, description).to(device=model.device, dtype=dtype)
        shapes = {key: tuple(x.shape) for key, x in modules[name].state_dict().items()}
        saved = {key: tuple(x.shape) for key, x in states[name].items()}
        if shapes != saved:
            raise ValueError(f"{name} must have the tensors saved in {path}, {saved}, got {shapes}")
    found = {int(name.rpartition(".")[2]): module for name, module in modules.items() if name != CONNECTOR}
    return Saved(settings["config"], modules.get(CONNECTOR), found or None, states)


def named_modules(connector: nn.Module | None, projectors: Mapping[int, nn.Module] | None) -> dict[str, nn.Module]:
    found = {} if connector is None else {CONNECTOR: connector}
    return found | {f"projectors.{layer}": module for layer, module in (projectors or {}).items()}


def _describe(module: nn.Module) -> dict[str, Any]:
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
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} must be a file that handle.save wrote, got {said}") from error
