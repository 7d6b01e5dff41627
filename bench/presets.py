"""The language models that are measured: published shapes with random weights, or a local directory.

Time and memory do not depend on the weights' values, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.initialization import no_init_weights

from palkernels.bench.errors import UserError, one_line

__all__ = ["PRESETS", "Llm", "LlmPlan", "plan_llm"]

# Llama 3.2 stretches its RoPE from 8192 positions; the values are those of the published config.json files.
_LLAMA_3_2 = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

PRESETS: dict[str, Callable[[], Any]] = {
    "llama-3.2-1b": lambda: LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        **_LLAMA_3_2,
    ),
    "llama-3.2-3b": lambda: LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        **_LLAMA_3_2,
    ),
    "qwen2.5-1.5b": lambda: Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        bos_token_id=151643,
        eos_token_id=151643,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
}


@dataclass(frozen=True)
class Llm:
    """A built model. `weights` says where its weights come from, for printing beside results."""

    model: Any
    weights: str


@dataclass(frozen=True)
class LlmPlan:
    """A model that is known but not built yet: building takes seconds and gigabytes."""

    name: str
    config: Any  # with `layers` layers
    full_layers: int
    directory: Path | None  # where weights are read from; None: random ones

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    def build(self, dtype: torch.dtype, device: torch.device, seed: int) -> Llm:
        """Build the model, in evaluation mode and with PyTorch SDPA as its attention.

        Raises:
            UserError: the directory's weights cannot be read or are incomplete.
        """
        if self.directory is not None:
            model = _load(self.directory, self.config, dtype).to(device)
            weights = str(self.directory)
        else:
            with no_init_weights():  # transformers' own takes half a minute for 400M parameters on two cores
                model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="sdpa")
            model.tie_weights()
            if device.type != "cpu":
                model.to(device)
            _randomise(model, seed)
            weights = f"random (seed {seed})"
        # A run generates a fixed number of tokens, so no token may end it.
        model.generation_config.eos_token_id = None
        return Llm(model.eval(), weights)


def plan_llm(name: str, layers: int | None) -> LlmPlan:
    """Look up a preset or a local directory, and cut it to its first `layers` layers (None: keep all).

    Raises:
        UserError: the name is neither, the directory has no readable config.json, or there are fewer layers.
    """
    directory: Path | None = None
    if name in PRESETS:
        config = PRESETS[name]()
    else:
        path = Path(name)
        if not (path / "config.json").is_file():
            known = ", ".join(PRESETS)
            raise UserError(f"model must be one of {known} or a directory with a config.json, got {name!r}")
        try:
            config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
            has_weights = any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
        except Exception as error:  # whatever a malformed setting makes transformers raise
            raise UserError(
                f"model directory {name!r} must hold a valid config.json, got: {one_line(error)}"
            ) from error
        directory = path if has_weights else None
    full_layers = getattr(config, "num_hidden_layers", None)
    missing = [key for key in ("hidden_size", "intermediate_size", "vocab_size") if not hasattr(config, key)]
    if not isinstance(full_layers, int) or missing:
        wanted = "num_hidden_layers, hidden_size, intermediate_size and vocab_size"
        raise UserError(f"model directory {name!r} must name {wanted}, got a config of type {config.model_type!r}")
    if layers is not None:
        if not 1 <= layers <= full_layers:
            raise UserError(f"--layers must be from 1 to {full_layers} for {name}, got {layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    return LlmPlan(name, config, full_layers, directory)


def _load(directory: Path, config: Any, dtype: torch.dtype) -> Any:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a damaged file makes safetensors or transformers raise
        raise UserError(
            f"model directory {str(directory)!r} must hold readable weights, got: {one_line(error)}"
        ) from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise UserError(f"model directory {str(directory)!r} must hold every weight, got none for {first!r}")
    return model


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill in random weights of standard deviation 0.02, zero biases and norms of one."""
    parameters = list(model.named_parameters())
    generator = torch.Generator(parameters[0][1].device).manual_seed(seed)
    width = 0.02 * 3**0.5  # uniform values are drawn five times as fast as normal ones
    with torch.no_grad():
        for name, parameter in parameters:
            if parameter.ndim > 1:
                parameter.uniform_(-width, width, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)  # norm weights
