"""Checkpoints and state dicts of another layout: the error says what they are and what reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.towers import (
    SMALL_TOWERS,
    SMALL_WHISPER,
    clap_checkpoint,
    equal,
    small_whisper,
    weights,
    whisper_checkpoint,
)
from torch import Tensor
from transformers import ASTConfig, ASTForAudioClassification, PreTrainedModel, Wav2Vec2Config, Wav2Vec2Model

from palkernels.model import TOWERS, ClapTower, SslamTower, WhisperTower


def small_ast() -> PreTrainedModel:
    config = ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, max_length=32)
    return ASTForAudioClassification(config)


def small_wav2vec() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 1}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions)
    return Wav2Vec2Model(config)


def refusal(name: str, path: Path) -> str:
    with pytest.raises(ValueError, match=", got ") as caught:
        TOWERS[name].from_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {str(path)!r} must ")
    assert len(message.splitlines()) == 1
    return message


def make(kind: str, path: Path) -> None:
    """Write a checkpoint of a model that is none of SSLAM's, CLAP's or Whisper's, or of one of them."""
    path.mkdir()
    if kind == "whisper":
        whisper_checkpoint(path)
    elif kind == "clap":
        clap_checkpoint(path)
    elif kind == "ast":
        small_ast().save_pretrained(path)
    elif kind == "wav2vec":
        small_wav2vec().save_pretrained(path)
    elif kind == "pal":
        tower = SslamTower(**SMALL_TOWERS["sslam"])
        save_file({f"audio_tower.0.{name}": x for name, x in weights(tower).items()}, path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "pal"}')
    else:
        save_file({kind: torch.ones(1)}, path / "model.safetensors")
        (path / "config.json").write_text('{"model_type": "other"}')


PAL = "which PalForConditionalGeneration.from_pretrained reads, its audio_tower included"


@pytest.mark.parametrize(
    ("kind", "model_type", "tensors"),
    [
        (
            "ast",
            "'audio-spectrogram-transformer', which no tower reads",
            "transformers' AST, another network, which no",
        ),
        ("wav2vec", "'wav2vec2', which no tower reads", "wav2vec 2.0 or one like it, which no tower reads"),
        ("whisper", "'whisper', which WhisperTower reads", "a Whisper encoder, which WhisperTower reads"),
        ("clap", "'clap', which ClapTower reads", "a CLAP audio encoder, which ClapTower reads"),
        ("pal", f"'pal', {PAL}", f"a whole audio LLM, {PAL}"),
        ("cls_token", "'other', which no tower reads", "another vision transformer, which no tower reads"),
        ("module.audio_branch.bn0.bias", "'other'", "LAION's own CLAP, of which ClapTower reads transformers' port"),
        ("encoder.blocks.0.attn.query.bias", "'other'", "OpenAI's own Whisper, of which WhisperTower reads"),
        ("base_model.model.q.lora_A.weight", "'other'", "adapters of peft, which merge_and_unload"),
    ],
)
def test_another_model(tmp_path: Path, kind: str, model_type: str, tensors: str) -> None:
    """SSLAM's weights have no config of transformers' and are known by their names, the others by their model type."""
    make(kind, tmp_path / "model")
    if kind not in ("whisper", "clap"):
        assert f"got model_type {model_type}" in refusal("whisper", tmp_path / "model")
        assert f"got model_type {model_type}" in refusal("clap", tmp_path / "model")
    else:
        assert f"got model_type {model_type}" in refusal("clap" if kind == "whisper" else "whisper", tmp_path / "model")
    message = refusal("sslam", tmp_path / "model")
    assert "must hold extra_tokens (1, 1, width) and positions of an SSLAM encoder, got " in message
    assert f"; they are those of {tensors}" in message


@pytest.mark.parametrize("name", ["whisper", "clap"])
def test_weights_of_another_model_beside_a_config(tmp_path: Path, name: str) -> None:
    """A config.json of the right type does not make them this encoder's."""
    make(name, tmp_path / "model")
    sslam = SslamTower(**SMALL_TOWERS["sslam"]).encoder.state_dict()
    save_file({f"model.{key}": x for key, x in sslam.items()}, tmp_path / "model" / "model.safetensors")
    message = refusal(name, tmp_path / "model")
    assert "missing, the first " in message
    assert f"{len(sslam)} unexpected" in message
    assert message.endswith("; they are those of an SSLAM encoder, which SslamTower reads")


@pytest.mark.parametrize(
    ("name", "setting", "advice"),
    [
        ("clap", {"depths": [1, 1, 1, 1]}, "; its config.json has depths [1, 1, 1, 1], its tensors [1, 1, 2, 1]"),
        ("clap", {"depths": [1, 1, 3, 1]}, "; its config.json has depths [1, 1, 3, 1], its tensors [1, 1, 2, 1]"),
        ("whisper", {"encoder_layers": 3}, "; its config.json has encoder_layers 3, its tensors 2"),
    ],
)
def test_another_depth_than_the_configs(tmp_path: Path, name: str, setting: dict[str, Any], advice: str) -> None:
    make(name, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    (config["audio_config"] if name == "clap" else config).update(setting)
    path.write_text(json.dumps(config))
    assert refusal(name, tmp_path / "model").endswith(advice)


def test_a_fine_tuned_clap_with_a_head(tmp_path: Path) -> None:
    """Other depths are read as the config.json says, and a classifier around the encoder is left out."""
    clap_checkpoint(tmp_path, depths=[1, 2, 1, 1])
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {"classifier.weight": torch.ones(3, 64)}, file, {"format": "pt"})
    tower = ClapTower.from_checkpoint(tmp_path)
    assert tower.config["depths"] == [1, 2, 1, 1]
    assert all(torch.equal(x, stored[f"audio_model.{name}"]) for name, x in tower.encoder.state_dict().items())


def test_files_that_are_there_instead(tmp_path: Path) -> None:
    """The directory's own files are named, and a file is not called nothing."""
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"must be an existing directory, got a file$"):
        WhisperTower.from_checkpoint(tmp_path / "pytorch_model.bin")
    for name in ("adapter_config.json", "b", "c"):
        (tmp_path / name).touch()
    assert refusal("clap", tmp_path).endswith(
        "a readable config.json, which save_pretrained writes, got adapter_config.json, b, c and 1 more"
    )
    SMALL_WHISPER.save_pretrained(tmp_path)
    (tmp_path / "c").unlink()
    assert refusal("whisper", tmp_path).endswith(
        "neither model.safetensors nor its index, which save_pretrained writes, but adapter_config.json, b, "
        "config.json and 1 more"
    )


def test_an_sslam_towers_own_state(tmp_path: Path) -> None:
    """It does not tell its heads: its config must be there too."""
    save_file(weights(SslamTower(**SMALL_TOWERS["sslam"])), tmp_path / "a.safetensors")
    assert refusal("sslam", tmp_path / "a.safetensors").endswith(
        "; they are a tower's state_dict, which load_state_dict of a tower with its config takes"
    )


def refused_state(name: str, state: dict[str, Tensor], **settings: Any) -> str:
    tower = TOWERS[name](**SMALL_TOWERS[name] | settings)
    before = {key: x.clone() for key, x in weights(tower).items()}
    with pytest.raises(RuntimeError, match=r"^state_dict must hold ") as caught:
        tower.load_state_dict(state)
    assert equal(weights(tower), before)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_state_dicts_of_another_layout() -> None:
    """Nothing is loaded, and what to do is said."""
    whisper = small_whisper()
    reads = "; WhisperTower.from_checkpoint reads a directory with a Whisper encoder"
    for model in (whisper, whisper.model):
        message = refused_state("whisper", model.state_dict())
        assert "every tensor of this WhisperTower and no other, got " in message
        assert message.endswith(reads)
    assert refused_state("whisper", whisper.get_encoder().state_dict()).endswith(
        "; tower.encoder.load_state_dict takes an encoder's own"
    )
    message = refused_state("sslam", small_ast().state_dict())
    assert "; they are those of transformers' AST, another network, which no tower reads; SslamTower." in message
    message = refused_state("clap", weights(WhisperTower(**SMALL_TOWERS["whisper"])))
    assert "; they are those of a Whisper encoder, which WhisperTower reads; " in message
    own = weights(SslamTower(**SMALL_TOWERS["sslam"]))
    assert refused_state("sslam", {name: x for name, x in own.items() if "qkv.bias" not in name}) == (
        "state_dict must hold every tensor of this SslamTower, got 2 missing, the first "
        "'encoder.blocks.0.attn.qkv.bias', 'encoder.blocks.1.attn.qkv.bias'"
    )
    assert refused_state("sslam", own, hidden_size=16) == (
        "state_dict must hold encoder.extra_tokens of this SslamTower with shape (1, 1, 16) as its config says, "
        "got (1, 1, 32)"
    )
    tower = SslamTower(**SMALL_TOWERS["sslam"], seed=3)
    loaded = tower.load_state_dict({"other": torch.ones(1)}, strict=False)
    assert loaded.unexpected_keys == ["other"]
