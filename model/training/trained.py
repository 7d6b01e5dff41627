"""What a stage trained, small: its tensors in one safetensors file, to be put into the model that the stage began with.

    model = PalForConditionalGeneration.from_pretrained("start")
    load_trained(model, "stages/1-align/trained.safetensors")

Adapters are kept as such in the file, and merged into the weights when they are loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from palkernels.errors import one_line
from palkernels.model.training.recipe import StageRecipe
from palkernels.model.training.stages import trained_tensors

__all__ = ["gather", "load_trained", "put_back", "save_trained"]

KEY = "palkernels"  # of the file's metadata
ADAPTER = ".default"  # peft's name for the adapter
NAMES_LISTED = 3


def gather(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return what training changes, whole and on the CPU. Of a sharded model all processes must call it; those with
    ``keep=False`` get nothing."""
    whole: dict[str, Tensor] = {}
    for name, tensor in trained_tensors(model):
        value = tensor.detach()
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = full.cpu().clone()
    return whole


@torch.no_grad()
def put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put what ``gather`` returned into a model of the same stage, sharded or not.

    Raises:
        ValueError: Other tensors train in the model.
    """
    own = dict(trained_tensors(model))
    _check_names(own, tensors, "the checkpoint")
    for name, tensor in own.items():
        value: Tensor = tensors[name].to(tensor.device)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


def save_trained(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], stage: StageRecipe, dtype: torch.dtype
) -> None:
    """Write what a stage trained to a safetensors file, floating tensors in a dtype, with what ``load_trained`` needs.

    Args:
        tensors: As ``gather`` returned them.
        path: The file.
        stage: The stage.
        dtype: The model's.
    """
    values = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    about: dict[str, Any] = {"train": list(stage.train), "stage": stage.name}
    if "lora" in stage.train:
        about["lora"] = {"r": stage.lora.r, "alpha": stage.lora.alpha}
    values = {name: x.contiguous() for name, x in values.items()}
    save_file(values, path, metadata={"format": "pt", KEY: json.dumps(about)})


@torch.no_grad()
def load_trained(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Put what a stage trained into the model that the stage began with; returns what the file says about itself.

    Args:
        model: An audio LLM like the one that was trained, without adapters.
        path: A stage's ``trained.safetensors``.

    Raises:
        ValueError: The file is none of these, or its tensors do not fit the model. The model is as before.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"path must be what a stage trained, got {os.fspath(path)!r}: {one_line(error, with_type=True)}"
        ) from error
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    adapters = {name for name in tensors if f".lora_A{ADAPTER}." in name}
    plain = {name: x for name, x in tensors.items() if ".lora_" not in name}
    merged = {_base_name(name): _product(tensors, name, about["lora"]) for name in adapters}
    _check_names({name: x for name, x in own.items() if name in plain or name in merged}, plain | merged, "the file")
    for name, value in plain.items():
        own[name].copy_(value)
    for name, change in merged.items():
        own[name].copy_(own[name].float() + change.to(own[name].device))
    return dict(about)


def _base_name(adapter: str) -> str:
    """Return the name of the weight to which an adapter adds."""
    return adapter.replace(f".lora_A{ADAPTER}.", ".")


def _product(tensors: Mapping[str, Tensor], name: str, lora: Mapping[str, float]) -> Tensor:
    """Return what an adapter adds to its weight, in float32."""
    up = tensors[name.replace(".lora_A.", ".lora_B.")]
    return (up.float() @ tensors[name].float()) * (lora["alpha"] / lora["r"])


def _check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    faults = [f"no {name!r}" for name in own if name not in given]
    faults += [f"{name!r}, which the model lacks" for name in given if name not in own]
    faults += [
        f"{name!r} of {tuple(given[name].shape)} for {tuple(x.shape)}"
        for name, x in own.items()
        if name in given and given[name].shape != x.shape
    ]
    if faults:
        more = f" and {len(faults) - NAMES_LISTED} more" if len(faults) > NAMES_LISTED else ""
        raise ValueError(f"{what} must hold what is trained of the model, got {'; '.join(faults[:NAMES_LISTED])}{more}")
