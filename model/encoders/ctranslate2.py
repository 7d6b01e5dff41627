"""Whisper's encoder in CTranslate2's format, in which faster-whisper's models are: a directory with a model.bin.

    u32 6                                   the format's version
    string "WhisperSpec", u32 3             what the model is, and the revision of that
    u32 count of variables, and of each     string name, u8 rank, u32 of each dimension, u8 type, u32 bytes, the values
    u32 count of aliases, and of each       string alias, string name of the variable that it stands for

Numbers are little-endian. A string is its u16 count of bytes, these, and a zero that counts. Weights may be float32,
float16 or bfloat16; int8, where a row w is stored as round(w * scale) beside the row's scale; or int16, with one scale.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from palkernels.model.encoders.weights import checkpoint_name

__all__ = ["is_ctranslate2", "read_whisper"]

MODEL = "model.bin"
FORMAT, SPEC, REVISION = 6, "WhisperSpec", 3
TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
LARGEST_RANK = 8
ENCODER = "encoder/"
SCALE = "_scale"  # at the end of its name: of the weight that is called so without it

# Names in an encoder, and what transformers' WhisperEncoder has there; {} is a layer's number, which both have.
NAMES = {
    "conv1/weight": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "conv2/weight": "conv2.weight",
    "conv2/bias": "conv2.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}
NAMES_IN_LAYER = {
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/linear_0/weight": "fc1.weight",
    "ffn/linear_0/bias": "fc1.bias",
    "ffn/linear_1/weight": "fc2.weight",
    "ffn/linear_1/bias": "fc2.bias",
}
JOINED = "self_attention/linear_0/"  # queries, keys and values, one below the other


def is_ctranslate2(directory: Path) -> bool:
    """Return whether a directory holds a model in CTranslate2's format."""
    return (directory / MODEL).is_file() and not any(directory.glob("*.safetensors"))


def read_whisper(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings of a Whisper encoder, by the names of `WhisperConfig`, and its tensors by those of
    transformers' `WhisperEncoder`.

    Raises:
        ValueError: The model is cut short or damaged, or no Whisper of this format.
    """
    try:
        with (directory / MODEL).open("rb") as file:
            variables = dequantised(_Reader(file).variables(ENCODER))
        return _settings(variables), _named_as_transformers(variables)
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint_name(directory)} must hold an intact {MODEL} of Whisper, got {error}") from error


class _Reader:
    """Reads a model from a file whose every count may be wrong. Errors say what is there."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, 2)
        file.seek(0)

    def variables(self, prefix: str) -> dict[str, Tensor]:
        """Return the variables whose names have a prefix, under the names without it, aliases among them."""
        version = self.number("I", "the version of its format")
        if version != FORMAT:
            raise ValueError(f"version {version} of CTranslate2's format, not {FORMAT}")
        spec, revision = self.string("the name of its kind"), self.number("I", "its revision")
        if (spec, revision) != (SPEC, REVISION):
            raise ValueError(f"a {spec!r} of revision {revision}, not a {SPEC!r} of revision {REVISION}")
        tensors: dict[str, Tensor] = {}
        names: set[str] = set()
        for _ in range(self.number("I", "the number of its variables")):
            name = self.string("a variable's name")
            if name in names:
                raise ValueError(f"two variables {name!r}")
            names.add(name)
            tensor = self.values(name, wanted=name.startswith(prefix))
            if tensor is not None:
                tensors[name.removeprefix(prefix)] = tensor
        for _ in range(self.number("I", "the number of its aliases")):
            alias, name = self.string("an alias"), self.string("the name that an alias stands for")
            if alias in names or name not in names:
                raise ValueError(f"an alias {alias!r} of {name!r}, which must be new and of a variable")
            names.add(alias)
            if alias.startswith(prefix):
                if not name.startswith(prefix):
                    raise ValueError(f"an alias {alias!r} of {name!r}, outside of what it belongs to")
                tensors[alias.removeprefix(prefix)] = tensors[name.removeprefix(prefix)]
        if self.file.tell() != self.size:
            raise ValueError(f"{self.size - self.file.tell()} bytes beyond its end")
        return tensors

    def values(self, name: str, wanted: bool) -> Tensor | None:
        """Return the tensor that comes next, or pass over it."""
        rank = self.number("B", f"the rank of {name}")
        if rank > LARGEST_RANK:
            raise ValueError(f"{name} of rank {rank}")
        shape = tuple(self.number("I", f"the shape of {name}") for _ in range(rank))
        kind, size = self.number("B", f"the type of {name}"), self.number("I", f"the size of {name}")
        if kind >= len(TYPES):
            raise ValueError(f"{name} of type {kind}, which is none")
        if size != math.prod(shape) * TYPES[kind].itemsize:
            raise ValueError(f"{size} bytes for {name} of shape {shape} in {TYPES[kind]}")
        self.check(size, f"the values of {name}")
        if not wanted:
            self.file.seek(size, 1)
            return None
        if not size:
            return torch.empty(shape, dtype=TYPES[kind])
        return torch.frombuffer(self.bytes(size, name), dtype=TYPES[kind]).view(shape)

    def number(self, form: str, what: str) -> int:
        """Return the unsigned integer that comes next."""
        value: int = struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}"), what))[0]
        return value

    def string(self, what: str) -> str:
        """Return the string that comes next."""
        text = self.bytes(self.number("H", what), what)
        if not text.endswith(b"\0") or b"\0" in text[:-1]:
            raise ValueError(f"{what} that does not end with a zero")
        return text[:-1].decode()  # a UnicodeDecodeError is a ValueError

    def bytes(self, count: int, what: str) -> bytearray:
        """Return the bytes that come next."""
        self.check(count, what)
        data = bytearray(count)
        self.file.readinto(data)  # type: ignore[attr-defined]
        return data

    def check(self, count: int, what: str) -> None:
        if count > self.size - self.file.tell():
            raise ValueError(f"an end of the file, after {self.size} bytes, amid {what}")


def dequantised(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return variables with each quantised weight in float32 instead of its integers and its scale."""
    plain: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        scale = variables.get(name + SCALE)
        if name.endswith(SCALE) and name.removesuffix(SCALE) in variables:
            continue
        if scale is None:
            plain[name] = tensor
            continue
        rows = tensor.shape[:1] if tensor.dtype == torch.int8 else ()
        if tensor.dtype not in (torch.int8, torch.int16) or not scale.is_floating_point() or scale.shape != rows:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}, {scale.dtype} of shape {tuple(scale.shape)}"
            raise ValueError(f"{name} and its scale that do not make up a quantised weight: {got}")
        if not bool((scale.isfinite() & (scale != 0)).all()):
            raise ValueError(f"a scale of {name} that is zero or not finite")
        plain[name] = tensor.float() / scale.float().view(*rows, *[1] * (tensor.ndim - len(rows)))
    return plain


def _settings(variables: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the shapes of an encoder's variables say of it."""
    shapes = {}
    for name, rank in (("conv1/weight", 3), ("layer_0/ffn/linear_0/weight", 2), ("num_heads", 0)):
        if name not in variables or variables[name].ndim != rank:
            got = f"one of rank {variables[name].ndim}" if name in variables else "none"
            raise ValueError(f"{got} where {ENCODER}{name} of rank {rank} must be")
        shapes[name] = tuple(variables[name].shape)
    width, mel_bins, _ = shapes["conv1/weight"]
    return {
        "d_model": width,
        "num_mel_bins": mel_bins,
        "encoder_layers": len({layer for name in variables if (layer := _layer(name)[0]) is not None}),
        "encoder_attention_heads": int(variables["num_heads"]),
        "encoder_ffn_dim": shapes["layer_0/ffn/linear_0/weight"][0],
    }


def _named_as_transformers(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an encoder's tensors by their names in transformers; what it does not have keeps its name."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        layer, inner = _layer(name)
        if name == "num_heads":
            continue
        if layer is None:
            tensors[NAMES.get(name, name)] = tensor
        elif inner.startswith(JOINED):
            tensors |= dict(_parted(f"layers.{layer}.self_attn", name, inner.removeprefix(JOINED), tensor))
        else:
            known = NAMES_IN_LAYER.get(inner)
            tensors[name if known is None else f"layers.{layer}.{known}"] = tensor
    return tensors


def _layer(name: str) -> tuple[int | None, str]:
    """Return a variable's layer and its name there, or None and its name."""
    first, _, rest = name.partition("/")
    number = re.fullmatch(r"layer_(0|[1-9]\d{0,4})", first, re.ASCII)
    return (None, name) if number is None else (int(number[1]), rest)


def _parted(prefix: str, name: str, kind: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the parts of a weight or bias of queries, keys and values, by their names."""
    if tensor.ndim == 0 or len(tensor) % 3:
        raise ValueError(f"{ENCODER}{name} of shape {tuple(tensor.shape)}, no queries, keys and values")
    for letter, part in zip("qkv", tensor.chunk(3), strict=True):
        if (letter, kind) != ("k", "bias"):
            yield f"{prefix}.{letter}_proj.{kind}", part
        elif bool(part.any()):
            raise ValueError(f"{ENCODER}{name} with a bias of keys, which Whisper's do not have")
