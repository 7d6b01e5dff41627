"""Whisper in a window shorter than 30 s."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.towers import SMALL_TOWERS, clip, equal, weights
from torch.nn.functional import gelu

from palkernels.model import WhisperTower
from palkernels.model.audio.features import WhisperFeatures

SECOND = 16_000


def tower_of(window_seconds: float | None) -> WhisperTower:
    return WhisperTower(**SMALL_TOWERS["whisper"], window_seconds=window_seconds)


@torch.no_grad()
def by_hand(encoder: Any, features: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder on features of any length: as many of its positions as there are states."""
    states = gelu(encoder.conv2(gelu(encoder.conv1(features)))).mT
    states = states + encoder.embed_positions.weight[: states.shape[1]]
    for layer in encoder.layers:
        states = layer(states, None)
    result: torch.Tensor = encoder.layer_norm(states)
    return result


@pytest.mark.parametrize("seconds", [3, 0.02, 7.5, 29.98])
def test_states_are_the_encoders_on_fewer_frames(seconds: float) -> None:
    tower = tower_of(seconds).double()
    count = round(seconds * 50)
    assert (tower.features.num_states, tower.features.max_samples) == (count, 320 * count)
    samples = min(320 * count, 2 * SECOND)
    features, lengths = tower.features([clip(samples)])
    assert features.shape == (1, 128, 2 * count)
    assert lengths.tolist() == [-(-samples // 320)]
    states = tower(features)
    assert states.shape == (1, count, 32)
    torch.testing.assert_close(states, by_hand(tower.encoder, features.double()), rtol=1e-9, atol=1e-10)


def test_it_hears_the_same_without_the_silence_behind() -> None:
    """Features are the first of the whole window's, if the clip leaves a frame's width free."""
    short, _ = WhisperFeatures(80, 3)([clip(2 * SECOND)])
    whole, _ = WhisperFeatures(80)([clip(2 * SECOND)])
    assert torch.equal(short, whole[..., :300])


def test_a_clip_does_not_depend_on_its_batch() -> None:
    tower = tower_of(3).double()
    clips = [clip(samples, seed=samples) for samples in (3 * SECOND, 321, 20_000)]
    features, lengths = tower.features(clips)
    states = tower(features)
    for number, waveform in enumerate(clips):
        alone, length = tower.features([waveform])
        assert length[0] == lengths[number]
        torch.testing.assert_close(states[number], tower(alone)[0], rtol=1e-9, atol=1e-10)


def test_weights_are_those_of_every_window(checkpoint: Path) -> None:
    """So a tower takes another window without other weights; the config says which it has."""
    whole, short = tower_of(None), tower_of(3)
    assert equal(weights(whole), weights(short))
    assert "window_seconds" not in whole.config
    again = WhisperTower(**json.loads(json.dumps(short.config)))
    again.load_state_dict(whole.state_dict())
    features, _ = short.features([clip(SECOND)])
    assert torch.equal(again(features), short(features))
    read, read_whole = (WhisperTower.from_checkpoint(checkpoint, **more) for more in ({"window_seconds": 3}, {}))
    assert equal(weights(read), weights(read_whole))
    assert WhisperTower.make_features(read.config).shape == (128, 300)
    torch.testing.assert_close(read(features), by_hand(read_whole.encoder, features))
    with torch.device("meta"):
        empty = WhisperTower(**short.config)
    assert empty(torch.zeros(1, 128, 300, device="meta")).shape == (1, 150, 32)


def test_a_longer_clip_and_other_features_are_refused() -> None:
    tower = tower_of(3)
    with pytest.raises(ValueError, match=r"must fit the encoder's window of 3 s \(48000 samples\), got 48001 samples"):
        tower.features([clip(3 * SECOND + 1)])
    with pytest.raises(ValueError, match=r"must have shape \(B, 128, 300\), got \(1, 128, 3000\)"):
        tower(torch.zeros(1, 128, 3000))


@pytest.mark.parametrize("seconds", [0, -3, 30.02, 0.03, True, "3", float("nan"), float("inf")])
def test_refuses_what_is_no_window(seconds: Any, checkpoint: Path) -> None:
    message = r"^window_seconds must be a multiple of 0.02 of at most 30, or None, got "
    with pytest.raises(ValueError, match=message):
        tower_of(seconds)
    with pytest.raises(ValueError, match=message):
        WhisperTower.from_checkpoint(checkpoint, window_seconds=seconds)
