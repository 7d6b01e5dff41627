"""Whisper models in CTranslate2's format, written byte by byte as its model_spec.py does."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]


def string(text: str) -> bytes:
    return struct.pack("<H", len(text.encode()) + 1) + text.encode() + b"\0"


def variable(name: str, tensor: Tensor) -> bytes:
    values = tensor.contiguous().view(-1).view(torch.uint8) if tensor.ndim else tensor.view(1).view(torch.uint8)
    shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
    data = bytes(values.tolist())
    return string(name) + shape + struct.pack("<BI", TYPES.index(tensor.dtype), len(data)) + data


def model_bytes(
    variables: Mapping[str, Tensor],
    aliases: Mapping[str, str] | None = None,
    version: int = 6,
    spec: str = "WhisperSpec",
    revision: int = 3,
) -> bytes:
    head = struct.pack("<I", version) + string(spec) + struct.pack("<II", revision, len(variables))
    body = b"".join(variable(name, tensor) for name, tensor in sorted(variables.items()))
    names = b"".join(string(alias) + string(name) for alias, name in (aliases or {}).items())
    return head + body + struct.pack("<I", len(aliases or {})) + names


def whisper_variables(model: Any) -> dict[str, Tensor]:
    """The variables of a transformers Whisper: its encoder's, and some of its decoder's."""
    state = model.model.encoder.state_dict()
    named = {
        "encoder/num_heads": torch.tensor(model.config.encoder_attention_heads, dtype=torch.int16),
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
        "encoder/layer_norm/gamma": state["layer_norm.weight"],
        "encoder/layer_norm/beta": state["layer_norm.bias"],
        "decoder/embeddings/weight": model.model.decoder.embed_tokens.weight.detach(),
    }
    for conv in ("conv1", "conv2"):
        named |= {f"encoder/{conv}/{kind}": state[f"{conv}.{kind}"] for kind in ("weight", "bias")}
    for layer in range(model.config.encoder_layers):
        ours, its = f"encoder/layer_{layer}", f"layers.{layer}"
        attention = f"{its}.self_attn"
        joined = [state[f"{attention}.{letter}_proj.weight"] for letter in "qkv"]
        query, value = state[f"{attention}.q_proj.bias"], state[f"{attention}.v_proj.bias"]
        named[f"{ours}/self_attention/linear_0/weight"] = torch.cat(joined)
        named[f"{ours}/self_attention/linear_0/bias"] = torch.cat([query, torch.zeros_like(query), value])
        for name, module in (
            ("self_attention/linear_1", "self_attn.out_proj"),
            ("ffn/linear_0", "fc1"),
            ("ffn/linear_1", "fc2"),
        ):
            named |= {f"{ours}/{name}/{kind}": state[f"{its}.{module}.{kind}"] for kind in ("weight", "bias")}
        for name, module in (("self_attention", "self_attn_layer_norm"), ("ffn", "final_layer_norm")):
            named[f"{ours}/{name}/layer_norm/gamma"] = state[f"{its}.{module}.weight"]
            named[f"{ours}/{name}/layer_norm/beta"] = state[f"{its}.{module}.bias"]
    return named


def quantised(variables: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Variables as CTranslate2 stores them by a name of its quantisations."""
    stored: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        is_linear = name.endswith("weight") and name.startswith("encoder/")
        if not tensor.is_floating_point():
            stored[name] = tensor
        elif is_linear and kind.startswith("int8"):
            rows = tensor.flatten(1)
            scale = 127 / rows.abs().amax(dim=1).clamp(min=1e-6)
            stored[name] = (rows * scale[:, None]).round().to(torch.int8).view(tensor.shape)
            stored[f"{name}_scale"] = scale
        elif is_linear and kind == "int16":
            scale = 2**10 / tensor.abs().max()
            stored[name], stored[f"{name}_scale"] = (tensor * scale).round().to(torch.int16), scale
        else:
            half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind.removeprefix("int8_"), torch.float32)
            stored[name] = tensor.to(half)
    return stored


def write(directory: Path, data: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.bin").write_bytes(data)
    (directory / "config.json").write_text('{"lang_ids": [1]}')  # CTranslate2's has no model type
    return directory
