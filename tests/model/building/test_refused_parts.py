"""Parts that are missing, damaged or something else: each is one line that says what must hold and what came."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import llm_checkpoint
from support.towers import SMALL_TOWERS, whisper_checkpoint

from palkernels.model import build

ENTRY = {"type": "sslam", "config": SMALL_TOWERS["sslam"]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    llm_checkpoint(folder)
    return folder


def refusal(llm: Any, encoders: Any = (ENTRY,), kind: type[Exception] = ValueError, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        build(llm, list(encoders) if isinstance(encoders, tuple) else encoders, **settings)
    message = str(caught.value)
    assert " must " in message
    assert len(message.splitlines()) == 1
    return message


def without_a_weight(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(settings | changes))

    return change


def cut_short(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "must hold a config.json, got generation_config.json, "),
        (lambda path: (path / "config.json").write_text("{"), "with a model_type, got JSONDecodeError"),
        (lambda path: (path / "config.json").write_text("[]"), "with a model_type, got TypeError"),
        (lambda path: (path / "tokenizer.json").unlink(), "must be a causal LM with its tokenizer, got "),
        (lambda path: (path / "model.safetensors").unlink(), "must be a causal LM with its tokenizer, got OSError"),
        (cut_short, "must be a causal LM with its tokenizer, got "),
        (without_a_weight, "LlamaForCausalLM, got 1 missing, the first 'model.layers.1.mlp.up_proj.weight'"),
        (configured(model_type="pal"), "must be a language model alone, got a whole audio LLM"),
        (configured(model_type="t5"), "must be a causal LM with its tokenizer, got "),
        (configured(model_type="new"), "must be a causal LM with its tokenizer, got "),
        (configured(quantization_config={"quant_method": "gptq", "bits": 4}), "that are quantised by 'gptq'"),
        (configured(hidden_size=64), "must be a causal LM with its tokenizer, got "),
        (configured(auto_map={"AutoModelForCausalLM": "x.Y"}, model_type="new"), "must be a causal LM with its tok"),
    ],
)  # fmt: skip
def test_a_damaged_language_model(llm: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    copy = shutil.copytree(llm, tmp_path / "copy")
    damage(copy)
    assert f"llm {str(copy)!r} must " in refusal(copy)
    assert message in refusal(copy)


def test_no_language_model(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("?")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a.gguf").write_bytes(b"")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    where = "must be a directory, a .gguf file or a name on the hub, got "
    for path, message in (
        (tmp_path / "none", where + "none there"),
        (tmp_path / "text", where + "a file"),
        ("a/b/c", where + "none there"),
        ("../a", where + "none there"),
        (tmp_path / "none.gguf", "must be a file, got nothing there"),
        (tmp_path / "folder.gguf", "must be a file, got a directory"),
        (
            tmp_path / "gguf",
            f"must hold a config.json, got a.gguf: {str(tmp_path / 'gguf' / 'a.gguf')!r} names a .gguf",
        ),
    ):
        assert message in refusal(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("owner/model")
    assert message.startswith("llm 'owner/model' must be a causal LM that the hub has, or a directory, got OSError: ")


def test_a_dtype_that_no_weight_has(llm: Path) -> None:
    for dtype in ("int8", "bf17", torch.int8, 16):
        assert refusal(llm, dtype=dtype).startswith("dtype must be one of bfloat16, float16, float32, float64 or None")


def test_seeds(llm: Path) -> None:
    for seed in (-1, 0.5, True):
        assert refusal(llm, seed=seed).startswith("seed must be an integer from 0 to 2**63 - 1, got")


def test_a_wrong_encoder(llm: Path, tmp_path: Path) -> None:
    whisper_checkpoint(tmp_path)
    for encoders, message in (
        ([], "encoders must be a list of at least one entry, got []"),
        ({"type": "whisper"}, "encoders must be a list of at least one entry"),
        ([{"checkpoint": tmp_path}], "an entry of encoders must have 'type', and may have checkpoint, config, integ"),
        ([{"type": "whisper", "path": tmp_path}], "an entry of encoders must have 'type', and may have checkpoint"),
        ([{"type": "wav2vec"}], "an encoder's type must be whisper, clap, sslam, or a list of them, got 'wav2vec'"),
        ([{"type": []}], "an encoder's type must be whisper, clap, sslam, or a list of them, got []"),
        ([{**ENTRY, "integration": "x"}], 'integration must be "lal", "plits" or "flamingo", got \'x\''),
        ([{**ENTRY, "connector": "mlp"}], 'connector must be a dict with its "type" and its settings, got \'mlp\''),
        ([{**ENTRY, "connector": {"type": "x"}}], 'a connector\'s type must be "mlp", "qformer" or "lfst", got \'x\''),
        ([{**ENTRY, "connector": {"type": "mlp", "stac": 4}}], "config of the connector 'mlp' must have keys of"),
        ([{**ENTRY, "connector": {"type": "lfst"}}], "the type must be ['sslam', 'clap'] for the connector 'lfst'"),
        ([{"type": ["sslam", "clap"], "checkpoint": [None], "connector": {"type": "lfst"}}], "must be a list of one"),
        ([{"type": "clap", "config": {"depths": [1] * 4}, "checkpoint": tmp_path}], "config must be None where"),
        ([{"type": "whisper", "config": {"d_model": 64}, "checkpoint": tmp_path}], "config must hold window_seconds"),
        ([{"type": "clap", "checkpoint": tmp_path}], "must hold a CLAP model, got model_type 'whisper'"),
        ([{"type": "whisper", "checkpoint": tmp_path / "x"}], "must be an existing directory, got none there"),
    ):  # fmt: skip
        assert message in refusal(llm, encoders)
    refusal(llm, ["whisper"], TypeError)
    refusal(llm, kind=TypeError, layrs="all")


def test_encoders_come_first(tmp_path: Path) -> None:
    """What is quick to find comes before what takes minutes: here there is no language model at all."""
    assert refusal(tmp_path / "none", ({"type": "whisper", "checkpoint": tmp_path},)).startswith("checkpoint ")
