"""Where an encoder's weights come from: a seed, or a checkpoint on this machine. Nothing is ever downloaded.

A checkpoint's tensors are read by name, and each one must be there with its shape. transformers' `from_pretrained`
would do more than is wanted: it takes pickled weights too, fills what is missing with random numbers, and takes a path
that is no directory for the name of a model to download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from palkernels.errors import one_line
from palkernels.model.encoders.layouts import files_in, layout_advice, model_type_advice

__all__ = [
    "build_seeded", "checkpoint_name", "fill", "load_config", "outline", "read_json", "read_tensors", "seeded",
    "tensor_faults",
]  # fmt: skip

Module = TypeVar("Module", bound=nn.Module)
NAMES_LISTED = 3  # names of tensors that an error spells out; it counts the others


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what is drawn on the CPU come from `seed`; afterwards the global random state is as it was.

    Raises:
        ValueError: `seed` is no integer from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    # The CPU's generator alone: torch.manual_seed would reseed the CUDA devices too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def build_seeded(make: Callable[[], Module], seed: int) -> Module:
    """Return what `make` builds, its random weights drawn on the CPU from `seed`, as :func:`seeded` does.

    Raises:
        ValueError: `seed` is no integer from 0 to 2**63 - 1.
    """
    with seeded(seed):
        return make()


def outline(make: Callable[[], Module], path: Path, description: str) -> Module:
    """Return what `make` builds, without memory for its weights: they come from the checkpoint at `path`.

    Raises:
        ValueError: The checkpoint's settings describe no such module; `description` says which, for the error.
    """
    try:
        with torch.device("meta"):
            return make()
    except (ValueError, RuntimeError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(
            f"{checkpoint_name(path)} must describe {description}, got {one_line(error, with_type=True)}"
        ) from error


def load_config(directory: Path, config_class: Any, model_types: tuple[str, ...], description: str) -> Any:
    """Return the transformers configuration in the directory's config.json, as a `config_class`.

    Raises:
        ValueError: There is no such directory, or its config.json is unreadable, malformed or of a model type that is
            not among `model_types`; `description` says for the error what these are.
    """
    name = checkpoint_name(directory)
    if not directory.is_dir():
        raise ValueError(
            f"{name} must be an existing directory, got {'a file' if directory.exists() else 'none there'}"
        )
    try:
        model_type = read_json(directory / "config.json")["model_type"]
    except FileNotFoundError as error:
        raise ValueError(
            f"{name} must hold a readable config.json, which save_pretrained writes, got {files_in(directory)}"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{name} must hold a readable config.json, got {one_line(error, with_type=True)}") from error
    except KeyError:
        model_type = None
    if model_type not in model_types:
        raise ValueError(
            f"{name} must hold {description}, got model_type {model_type!r}{model_type_advice(model_type)}"
        )
    try:
        return config_class.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever a malformed setting makes transformers raise
        raise ValueError(f"{name} must hold a valid config.json, got {one_line(error, with_type=True)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        OSError, ValueError, TypeError: The file cannot be read, is no JSON or holds something else.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise TypeError(f"{path.name} must hold a JSON object, got {type(content).__name__}")
    return content


def read_tensors(path: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a directory with one or with shards, on the CPU.

    Args:
        path: The file or the directory.
        rename: From a tensor's stored name to the one it gets here, or None for a tensor that is not to be read.

    Raises:
        ValueError: The weights are missing or damaged, a shard lies elsewhere, or two tensors get one name.
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
        raise ValueError(
            f"{checkpoint_name(path)} must hold safetensors weights, got {one_line(error, with_type=True)}"
        ) from error
    return tensors


def _files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: itself, the directory's one file, or its shards."""
    if path.is_file():
        return [path]
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"neither model.safetensors nor its index, which save_pretrained writes, but {files_in(path)}")
    shards = sorted(set(read_json(index)["weight_map"].values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"a shard outside the directory, {shard!r}")
    return [path / shard for shard in shards]


def tensor_faults(
    expected: Collection[str], names: Collection[str], description: str, layout: str | None = None
) -> str | None:
    """Return what an error says a state must hold and what it got instead; None where the names are as expected.

    Args:
        expected, names: Of the tensors that must be there, and of those that are.
        description: What the tensors must make up.
        layout: Of which encoder it is; None: what the description says.
    """
    missing, unexpected = set(expected) - set(names), set(names) - set(expected)
    if not missing and not unexpected:
        return None
    faults = [
        f"{len(wrong)} {fault}, the first {', '.join(map(repr, sorted(wrong)[:NAMES_LISTED]))}"
        for fault, wrong in (("missing", missing), ("unexpected", unexpected))
        if wrong
    ]
    only = f"{description} and no other" if unexpected else description
    return f"every tensor of {only}, got {' and '.join(faults)}{layout_advice(names, layout or description)}"


def fill(
    module: nn.Module,
    tensors: dict[str, Tensor],
    path: Path,
    description: str,
    reason: str = "as its config.json says",
    advice: str = "",
) -> None:
    """Give an outline its weights in the outline's dtypes, float32.

    Args:
        module: The outline.
        tensors: Every tensor of it and no other, by name.
        path, description, reason, advice: For errors: the checkpoint, what the module is, why shapes are as they are,
            and why tensors may be too few or too many.

    Raises:
        ValueError: A tensor is missing, unexpected or of another shape, or integers stand where floats must.
    """
    expected = module.state_dict()
    faults = tensor_faults(expected.keys(), tensors.keys(), description)
    if faults is not None:
        raise ValueError(f"{checkpoint_name(path)} must hold {faults}{advice}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{checkpoint_name(path)} must hold {name} with shape {tuple(tensor.shape)} {reason}, "
                f"got {tuple(tensors[name].shape)}"
            )
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{checkpoint_name(path)} must hold {name} as {tensor.dtype}, got {tensors[name].dtype}")
    module.load_state_dict({name: tensors[name].to(tensor.dtype) for name, tensor in expected.items()}, assign=True)


def checkpoint_name(path: Path) -> str:
    """Return what errors call a checkpoint."""
    return f"checkpoint {str(path)!r}"
