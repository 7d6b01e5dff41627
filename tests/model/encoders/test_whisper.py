"""WhisperAudioEncoder: the states are Whisper's own, of a looped clip, pooled to the number asked for."""

import json
import math
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from palkernels.model.encoders.whisper import WHISPER_SIZES, WhisperAudioEncoder

RATE = 16_000
WINDOW = 30 * RATE

# A Whisper small enough to be written and read many times.
SMALL = WhisperConfig(
    d_model=32,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    num_mel_bins=128,
    vocab_size=40,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
)


def clip(seconds: float, seed: int = 0) -> torch.Tensor:
    """Noise whose loudness and colour change, so that no two stretches of it look alike to the encoder."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(round(seconds * RATE), generator=generator)
    time = torch.arange(len(noise)) / RATE
    tone = torch.sin(2 * math.pi * (300 + 90 * time) * time)
    return 0.1 * noise * torch.sin(time) ** 2 + 0.2 * tone


@pytest.fixture(scope="module")
def whisper() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return WhisperForConditionalGeneration(SMALL).eval()


@pytest.fixture(scope="module")
def checkpoint(whisper: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whisper")
    whisper.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> WhisperAudioEncoder:
    return WhisperAudioEncoder.build(checkpoint=checkpoint)


@pytest.fixture(scope="module")
def tiny() -> WhisperAudioEncoder:
    return WhisperAudioEncoder.build("tiny")


@pytest.fixture(scope="module")
def unpooled(small: WhisperAudioEncoder) -> torch.Tensor:
    """All states of two windows of the clip that the pooling tests use."""
    states: torch.Tensor = small.encode(clip(7.0), 3000)
    return states


@torch.no_grad()
def by_hand(model: Any, waveform: torch.Tensor) -> torch.Tensor:
    """The 1500 states of one whole window, by transformers' own steps."""
    assert waveform.shape == (WINDOW,)
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    features = extractor(waveform.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
    states: torch.Tensor = model.get_encoder()(features).last_hidden_state[0]
    return states


def looped(waveform: torch.Tensor, samples: int) -> torch.Tensor:
    return waveform.repeat(samples // len(waveform) + 1)[:samples]


# Random weights


def test_published_shapes() -> None:
    """Width, layers, heads, feed-forward width, mel bins, as published with the models."""
    assert {name: tuple(shape.values()) for name, shape in WHISPER_SIZES.items()} == {
        "tiny": (384, 4, 6, 1536, 80),
        "base": (512, 6, 8, 2048, 80),
        "small": (768, 12, 12, 3072, 80),
        "medium": (1024, 24, 16, 4096, 80),
        "large-v3": (1280, 32, 20, 5120, 128),
    }


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 8_208_384), ("base", 20_590_592)])
def test_build_makes_the_published_encoder(size: str, parameters: int) -> None:
    encoder = WhisperAudioEncoder.build(size)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    assert encoder.size == size
    assert encoder.hidden_size == WHISPER_SIZES[size]["d_model"]


def test_seed_decides_the_weights(tiny: WhisperAudioEncoder) -> None:
    same, other = WhisperAudioEncoder.build("tiny", seed=0), WhisperAudioEncoder.build("tiny", seed=7)
    assert (tiny.weights, other.weights) == ("random (seed 0)", "random (seed 7)")
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), same.parameters(), strict=True))
    weight = "encoder.layers.0.fc1.weight"
    assert not torch.equal(tiny.state_dict()[weight], other.state_dict()[weight])


def test_global_random_state_is_neither_read_nor_changed(checkpoint: Path, tiny: WhisperAudioEncoder) -> None:
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again = WhisperAudioEncoder.build("tiny")
    assert torch.equal(torch.get_rng_state(), before)
    weight = "encoder.layers.0.fc1.weight"
    assert torch.equal(again.state_dict()[weight], tiny.state_dict()[weight])
    WhisperAudioEncoder.build(checkpoint=checkpoint).encode(clip(1.0), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_default_device_does_not_reach_the_weights(tiny: WhisperAudioEncoder) -> None:
    with torch.device("meta"):
        encoder = WhisperAudioEncoder.build("tiny")
    weight = "encoder.layers.0.fc1.weight"
    assert torch.equal(encoder.state_dict()[weight], tiny.state_dict()[weight])


# The states


def test_states_are_those_of_transformers(whisper: Any, small: WhisperAudioEncoder) -> None:
    waveform = clip(30.0)
    torch.testing.assert_close(small.encode(waveform, 1500), by_hand(whisper, waveform))


def test_short_clip_is_looped(small: WhisperAudioEncoder) -> None:
    waveform = clip(7.0)
    states = small.encode(waveform, 1500)
    assert torch.equal(states, small.encode(looped(waveform, WINDOW), 1500))
    silence = torch.zeros(WINDOW - len(waveform))
    assert not torch.allclose(states, small.encode(torch.cat([waveform, silence]), 1500), atol=1e-2)


def test_loop_runs_on_across_windows(whisper: Any, small: WhisperAudioEncoder) -> None:
    """3000 states are two windows. The second starts in the clip where the first stopped, not anew."""
    waveform = clip(7.0)
    long = looped(waveform, 2 * WINDOW)
    states = small.encode(waveform, 3000)
    assert states.shape == (3000, 32)
    torch.testing.assert_close(states[:1500], by_hand(whisper, long[:WINDOW]))
    torch.testing.assert_close(states[1500:], by_hand(whisper, long[WINDOW:]))
    assert not torch.allclose(states[:1500], states[1500:], atol=1e-2)


@pytest.mark.parametrize(("num_tokens", "windows"), [(1, 1), (1500, 1), (1501, 2), (3001, 3)])
def test_number_of_windows(small: WhisperAudioEncoder, num_tokens: int, windows: int) -> None:
    batches: list[int] = []
    hook = small.encoder.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    try:
        assert small.encode(clip(7.0), num_tokens).shape == (num_tokens, 32)
    finally:
        hook.remove()
    assert sum(batches) == windows
    assert max(batches) == 1  # memory: one window at a time


def test_long_clip_is_cut_to_the_windows(small: WhisperAudioEncoder) -> None:
    waveform = clip(40.0)
    assert torch.equal(small.encode(waveform, 100), small.encode(waveform[:WINDOW], 100))


@pytest.mark.parametrize("num_tokens", [1, 100, 750])
def test_pooling_is_the_mean_for_divisors(small: WhisperAudioEncoder, unpooled: torch.Tensor, num_tokens: int) -> None:
    expected = unpooled[:1500].view(num_tokens, -1, 32).mean(dim=1)
    torch.testing.assert_close(small.encode(clip(7.0), num_tokens), expected)


@pytest.mark.parametrize("num_tokens", [7, 1499, 2000])
def test_pooling_is_as_documented_for_others(
    small: WhisperAudioEncoder, unpooled: torch.Tensor, num_tokens: int
) -> None:
    n = 1500 * math.ceil(num_tokens / 1500)
    expected = torch.stack(
        [unpooled[i * n // num_tokens : -(-(i + 1) * n // num_tokens)].mean(dim=0) for i in range(num_tokens)]
    )
    torch.testing.assert_close(small.encode(clip(7.0), num_tokens), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_waveform_of_another_dtype(small: WhisperAudioEncoder, dtype: torch.dtype) -> None:
    waveform = clip(2.0).to(dtype)
    states = small.encode(waveform, 10)
    assert states.dtype == torch.float32
    assert torch.equal(states, small.encode(waveform.float(), 10))


def test_waveform_is_left_alone(small: WhisperAudioEncoder) -> None:
    waveform = clip(2.0).requires_grad_()
    before = waveform.detach().clone()
    small.encode(waveform, 10)
    assert torch.equal(waveform, before)


def test_one_sample_and_silence_are_clips(small: WhisperAudioEncoder) -> None:
    assert small.encode(torch.ones(1), 3).isfinite().all()
    assert small.encode(torch.zeros(100), 3).isfinite().all()


def test_encoder_of_another_dtype(checkpoint: Path, small: WhisperAudioEncoder) -> None:
    half = WhisperAudioEncoder.build(checkpoint=checkpoint).to(torch.bfloat16)
    states = half.encode(clip(2.0), 10)
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states.float(), small.encode(clip(2.0), 10), rtol=0, atol=0.1)


# Frozen


def test_no_gradients_and_no_training(small: WhisperAudioEncoder) -> None:
    assert not any(parameter.requires_grad for parameter in small.parameters())
    outer = torch.nn.ModuleDict({"encoder": small, "connector": torch.nn.Linear(32, 4)})
    outer.train()
    assert outer["connector"].training
    assert not any(module.training for module in small.modules())
    states = small.encode(clip(2.0).requires_grad_(), 10)
    assert not states.requires_grad
    # Nor does encoding record anything should somebody unfreeze the weights.
    unfrozen = WhisperAudioEncoder.build().requires_grad_(True)
    assert not unfrozen.encode(clip(2.0), 10).requires_grad
    # Not an inference tensor either: a connector behind it must be able to train on the states.
    outer["connector"](states).sum().backward()
    assert outer["connector"].weight.grad is not None


# Checkpoints


def test_checkpoint_is_named_and_recognised(tmp_path: Path, tiny: WhisperAudioEncoder) -> None:
    tiny.encoder.save_pretrained(tmp_path)
    loaded = WhisperAudioEncoder.build("large-v3", checkpoint=tmp_path)
    assert loaded.weights == str(tmp_path)
    assert (loaded.size, loaded.hidden_size) == ("tiny", 384)  # the checkpoint's, whatever was asked for
    assert torch.equal(loaded.encode(clip(3.0), 5), tiny.encode(clip(3.0), 5))


def test_shape_that_was_not_published_is_custom(small: WhisperAudioEncoder) -> None:
    assert (small.size, small.hidden_size) == ("custom", 32)


@pytest.mark.parametrize("layout", ["whole", "without head", "encoder only", "shards", "float16"])
def test_checkpoint_layouts(tmp_path: Path, whisper: Any, small: WhisperAudioEncoder, layout: str) -> None:
    if layout == "without head":
        model = WhisperModel(SMALL)
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
    assert refusal(tmp_path).endswith("must hold a Whisper model, got model_type 'llama'")


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
    SMALL.save_pretrained(tmp_path)
    torch.save(whisper.state_dict(), tmp_path / "pytorch_model.bin")
    assert "must hold safetensors weights" in refusal(tmp_path)


def test_refuses_weights_that_are_damaged_or_elsewhere(tmp_path: Path, checkpoint: Path) -> None:
    SMALL.save_pretrained(tmp_path)
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


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "size must be one of tiny, base, small, medium, large-v3, got 'huge'"),
        ({"seed": -1}, "seed must be an integer from 0 to 2**63 - 1, got -1"),
        ({"seed": 1.5}, "seed must be an integer from 0 to 2**63 - 1, got 1.5"),
    ],
)
def test_build_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        WhisperAudioEncoder.build(**options)


@pytest.mark.parametrize(
    ("waveform", "num_tokens", "message"),
    [
        ([0.0], 1, "waveform must be a torch.Tensor, got list"),
        (torch.zeros(1, 10), 1, "waveform must have shape (samples,), got (1, 10)"),
        (torch.zeros(10, dtype=torch.int16), 1, "waveform must be floating point, got torch.int16"),
        (torch.zeros(0), 1, "waveform must hold at least one sample, got none"),
        (torch.tensor([0.0, math.nan]), 1, "waveform must be finite and within 2**31"),
        (torch.tensor([0.0, -math.inf]), 1, "waveform must be finite and within 2**31"),
        (torch.tensor([math.inf], dtype=torch.float16), 1, "waveform must be finite and within 2**31"),
        (torch.tensor([1e300], dtype=torch.float64), 1, "waveform must be finite and within 2**31"),
        (torch.tensor([0.0, 1e30]), 1, "waveform must be finite and within 2**31"),
        (torch.zeros(10), 0, "num_tokens must be a positive integer, got 0"),
        (torch.zeros(10), 2.0, "num_tokens must be a positive integer, got 2.0"),
        (torch.zeros(10), True, "num_tokens must be a positive integer, got True"),
    ],
)
def test_encode_arguments(small: WhisperAudioEncoder, waveform: Any, num_tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        small.encode(waveform, num_tokens)
