"""Checkpoints, by the example of Whisper: every layout is read, what does not fit is refused, nothing is downloaded."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.towers import SMALL_WHISPER
from transformers import LlamaConfig, WhisperModel

from palkernels.model import WhisperAudioEncoder


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> WhisperAudioEncoder:
    return WhisperAudioEncoder.build(checkpoint=checkpoint)


@pytest.mark.parametrize("layout", ["whole", "without head", "encoder only", "shards", "float16"])
def test_checkpoint_layouts(tmp_path: Path, whisper: Any, small: WhisperAudioEncoder, layout: str) -> None:
    if layout == "without head":
        model = WhisperModel(SMALL_WHISPER)
        model.load_state_dict(whisper.model.state_dict())
        model.save_pretrained(tmp_path)
    elif layout == "encoder only":
        whisper.get_encoder().save_pretrained(tmp_path)
        assert "conv1.weight" in load_file(tmp_path / "model.safetensors")
    elif layout == "shards":
        whisper.save_pretrained(tmp_path, max_shard_size="40KB")
        assert not (tmp_path / "model.safetensors").exists()
    else:
        whisper.save_pretrained(tmp_path)
    expected = small.state_dict()
    if layout == "float16":
        file = tmp_path / "model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        expected = {name: tensor.half().float() for name, tensor in expected.items()}
    loaded = WhisperAudioEncoder.build(checkpoint=str(tmp_path)).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_nothing_is_downloaded(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.chdir(tmp_path)
    WhisperAudioEncoder.build("tiny")
    WhisperAudioEncoder.build(checkpoint=checkpoint)
    with pytest.raises(ValueError, match="must be an existing directory"):
        WhisperAudioEncoder.build(checkpoint="openai/whisper-tiny")


def refusal(path: Path | str) -> str:
    with pytest.raises(ValueError, match=", got ") as caught:
        WhisperAudioEncoder.build(checkpoint=path)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {str(path)!r} must ")
    assert len(message.splitlines()) == 1
    return message


def test_refuses_a_path_without_checkpoint(tmp_path: Path) -> None:
    assert "must be an existing directory" in refusal(tmp_path / "none")
    assert "must hold a readable config.json" in refusal(tmp_path)
    file = tmp_path / "file"
    file.write_text("{}")
    assert "must be an existing directory" in refusal(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "\n{\n'a': 1}"])
def test_refuses_a_broken_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert "must hold a readable config.json" in refusal(tmp_path)


def test_refuses_another_model(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    assert refusal(tmp_path).endswith("must hold a Whisper model, got model_type 'llama', which no tower reads")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("d_model", "wide", "must hold a valid config.json"),
        ("max_source_positions", 750, "must have 1500 source positions, got 750"),
        ("encoder_attention_heads", 3, "must describe a Whisper encoder"),
        (
            "d_model",
            64,
            "must hold conv1.weight with shape (64, 128, 3) as its config.json says, got (32, 128, 3)",
        ),
        (
            "encoder_layers",
            3,
            "must hold every tensor of a Whisper encoder, got 15 missing, the first 'layers.2.",
        ),
        (
            "encoder_layers",
            1,
            "must hold every tensor of a Whisper encoder and no other, got 15 unexpected, the first 'layers.1.",
        ),
    ],
)
def test_refuses_a_config_that_does_not_fit(
    tmp_path: Path, checkpoint: Path, setting: str, value: Any, message: str
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    assert message in refusal(tmp_path)


def test_reads_no_pickled_weights(tmp_path: Path, whisper: Any) -> None:
    SMALL_WHISPER.save_pretrained(tmp_path)
    torch.save(whisper.state_dict(), tmp_path / "pytorch_model.bin")
    assert "must hold safetensors weights" in refusal(tmp_path)


def test_refuses_weights_that_are_damaged_or_elsewhere(tmp_path: Path, checkpoint: Path) -> None:
    SMALL_WHISPER.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    assert "must hold safetensors weights" in refusal(tmp_path)
    weights.unlink()
    index = tmp_path / "model.safetensors.index.json"
    outside = str(checkpoint / "model.safetensors")
    for content in ("", "[]", "{}", json.dumps({"weight_map": {"a": outside}}), '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        assert "must hold safetensors weights" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert "gone.safetensors" in refusal(tmp_path)
