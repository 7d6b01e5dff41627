"""`palkernels figure1` on a model small enough for seconds."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from palkernels.bench.cli import main

FILES = ["figure1.csv", "figure1.html", "figure1.json", "figure1.png"]


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def run(*arguments: object) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def small(tiny: Path, out: Path) -> list[object]:
    """Return the arguments of a run of two points on the model in a directory."""
    sizes = ["--text-tokens", 16, "--new-tokens", 2, "--repeats", 2, "--dtype", "fp32", "--device", "cpu"]
    sizes += ["--clip-seconds", "none"]
    return ["figure1", "--model", tiny, "--audio-tokens", "16,256", *sizes, "--out", out]
