"""Whisper: transformers' states of a window, and those of a looped clip pooled to the number asked for."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.towers import whisper_checkpoint
from transformers import WhisperFeatureExtractor

from palkernels.model import WHISPER_SIZES, WhisperAudioEncoder, WhisperTower

RATE = 16_000
WINDOW = 30 * RATE


def clip(seconds: float, seed: int = 0) -> torch.Tensor:
    """Noise whose loudness and colour change, so that no two stretches of it look alike to the encoder."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(round(seconds * RATE), generator=generator)
    time = torch.arange(len(noise)) / RATE
    tone = torch.sin(2 * math.pi * (300 + 90 * time) * time)
    return 0.1 * noise * torch.sin(time) ** 2 + 0.2 * tone


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


def test_tower_gives_transformers_states(tmp_path: Path) -> None:
    """A tower from a whole model's directory gives the 1500 states that transformers gives."""
    model = whisper_checkpoint(tmp_path)
    tower = WhisperTower.from_checkpoint(tmp_path)
    waveform = clip(6.25)
    features = WhisperFeatureExtractor(feature_size=128)(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_encoder()(features.input_features).last_hidden_state
    input_features, lengths = tower.features([waveform])
    assert torch.equal(tower(input_features), expected)
    assert lengths.tolist() == [313]


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


def test_checkpoint_is_named_and_recognised(tmp_path: Path, tiny: WhisperAudioEncoder) -> None:
    tiny.encoder.save_pretrained(tmp_path)
    loaded = WhisperAudioEncoder.build("large-v3", checkpoint=tmp_path)
    assert loaded.weights == str(tmp_path)
    assert (loaded.size, loaded.hidden_size) == ("tiny", 384)  # the checkpoint's, whatever was asked for
    assert torch.equal(loaded.encode(clip(3.0), 5), tiny.encode(clip(3.0), 5))


def test_shape_that_was_not_published_is_custom(small: WhisperAudioEncoder) -> None:
    assert (small.size, small.hidden_size) == ("custom", 32)


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
        (torch.tensor([0.0, math.nan]), 1, "waveform must hold finite samples within 2**31"),
        (torch.tensor([0.0, -math.inf]), 1, "waveform must hold finite samples within 2**31"),
        (torch.tensor([math.inf], dtype=torch.float16), 1, "waveform must hold finite samples within 2**31"),
        (torch.tensor([1e300], dtype=torch.float64), 1, "waveform must hold finite samples within 2**31"),
        (torch.tensor([0.0, 1e30]), 1, "waveform must hold finite samples within 2**31"),
        (torch.zeros(10), 0, "num_tokens must be a positive integer, got 0"),
        (torch.zeros(10), 2.0, "num_tokens must be a positive integer, got 2.0"),
        (torch.zeros(10), True, "num_tokens must be a positive integer, got True"),
    ],
)
def test_encode_arguments(small: WhisperAudioEncoder, waveform: Any, num_tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        small.encode(waveform, num_tokens)
