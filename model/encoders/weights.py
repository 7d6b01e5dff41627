"""Where an encoder's weights come from: a seed, or a checkpoint on this machine. Nothing is ever downloaded.

A checkpoint's tensors are read by name, and each one must be there with its shape. `from_pretrained` would do more
than is wanted: it takes pickled weights too, fills what is missing with random numbers, and takes a path that is no
directory for the name of a model to download.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["drawn", "fill", "load_config", "named", "one_line", "outline", "read_tensors"]

Made = TypeVar("Made", bound=nn.Module)
LISTED = 3  # names that an error spells out; it counts the others


def drawn(make: Callable[[], Made], seed: int) -> Made:
    """What `make` makes, its random weights drawn on the CPU from `seed`. The global random state stays as it was."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    # The CPU's generator alone: torch.manual_seed would reseed the CUDA devices too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return make()


def outline(make: Callable[[], Made], path: Path, what: str) -> Made:
    """What `make` makes, without memory for its weights: they come from the checkpoint at `path`."""
    try:
        with torch.device("meta"):
            return make()
    except (ValueError, RuntimeError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{named(path)} must describe {what}, got {one_line(error)}") from error


def load_config(directory: Path, kind: Any, model_types: tuple[str, ...], what: str) -> Any:
    """The `kind` of transformers configuration in the directory's config.json, of one of `model_types`."""
    if not directory.is_dir():
        raise ValueError(f"{named(directory)} must be an existing directory, got none there")
    try:
        model_type = read_json(directory / "config.json")["model_type"]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{named(directory)} must hold a readable config.json, got {one_line(error)}") from error
    except KeyError:
        model_type = None
    if model_type not in model_types:
        raise ValueError(f"{named(directory)} must hold {what}, got model_type {model_type!r}")
    try:
        return kind.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever a malformed setting makes transformers raise
        raise ValueError(f"{named(directory)} must hold a valid config.json, got {one_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"{path.name} must hold a JSON object, got {type(content).__name__}")
    return content


def read_tensors(path: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a directory with one or with shards, by the names `rename` gives.

    It gives None for a tensor that is not wanted; that one is not read.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for file in _files(path):
            with safe_open(file, framework="pt", device="cpu") as weights:
                for key in weights.keys():  # noqa: SIM118 (a safetensors file cannot be iterated)
                    name = rename(key)
                    if name in tensors:
                        raise ValueError(f"{name!r} twice")
                    if name is not None:
                        tensors[name] = weights.get_tensor(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{named(path)} must hold safetensors weights, got {one_line(error)}") from error
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError("neither model.safetensors nor its index")
    shards = sorted(set(read_json(index)["weight_map"].values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"a shard outside the directory, {shard!r}")
    return [path / shard for shard in shards]


def fill(
    module: nn.Module, tensors: dict[str, Tensor], path: Path, what: str, reason: str = "as its config.json says"
) -> None:
    """Give an outline its weights, float32: every tensor of it and no other, each of its shape."""
    expected = module.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        found = [
            f"{len(names)} {kind}, the first {', '.join(map(repr, sorted(names)[:LISTED]))}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        only = " and no other" if unexpected else ""
        raise ValueError(f"{named(path)} must hold every tensor of {what}{only}, got {' and '.join(found)}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{named(path)} must hold {name} with shape {tuple(tensor.shape)} {reason}, "
                f"got {tuple(tensors[name].shape)}"
            )
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{named(path)} must hold {name} as {tensor.dtype}, got {tensors[name].dtype}")
    module.load_state_dict({name: tensors[name].to(tensor.dtype) for name, tensor in expected.items()}, assign=True)


def named(path: Path) -> str:
    return f"checkpoint {str(path)!r}"


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
