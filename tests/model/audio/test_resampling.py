"""Resampling: frequencies and amplitudes stay, and blocks do not show."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from support.sounds import RATE, sine, write

from palkernels.model import load_audio
from palkernels.model.audio import files


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_keeps_frequency_and_amplitude(tmp_path: Path, rate: int) -> None:
    seconds = 1.5
    path = write(tmp_path / "a", sine(1000.0, rate, seconds), rate, subtype="FLOAT")
    audio = load_audio(path).numpy()
    assert len(audio) == math.ceil(round(seconds * rate) * RATE / rate)
    middle = audio[4000:20_000]  # one second, so a bin of the spectrum is 1 Hz
    assert np.abs(np.fft.rfft(middle)).argmax() == 1000
    np.testing.assert_allclose(np.sqrt(2 * np.mean(middle**2)), 0.5, rtol=0.01)


def test_removes_what_the_lower_rate_cannot_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sine(11_000.0, 48_000), 48_000, subtype="FLOAT")
    assert load_audio(path)[1000:-1000].abs().max() < 0.01


def test_sampling_rate_of_the_result(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sine(1000.0, 44_100), 44_100)
    audio = load_audio(path, 48_000).numpy()
    assert len(audio) == 48_000
    assert np.abs(np.fft.rfft(audio)).argmax() == 1000


@pytest.mark.parametrize("block", [1, 100, 4_999, 2**16])
@pytest.mark.parametrize(("rate", "target"), [(44_100, 16_000), (8_000, 16_000), (48_000, 16_000), (16_000, 11_025)])
def test_in_blocks_equals_resampling_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, target: int, block: int
) -> None:
    """The block length must not show: neither a seam between blocks nor a sample more or less at the end."""
    frames = min(150_001, 200 * block + 1)
    samples = np.random.default_rng(0).uniform(-1, 1, frames).astype(np.float32)
    monkeypatch.setattr(files, "BLOCK_FRAMES", block)
    audio = load_audio(write(tmp_path / "a", samples, rate, subtype="FLOAT"), target)
    expected = torchaudio.functional.resample(torch.from_numpy(samples), rate, target)
    assert audio.shape == (math.ceil(frames * target / rate),)
    torch.testing.assert_close(audio, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_very_short_clips(tmp_path: Path, frames: int) -> None:
    path = write(tmp_path / "a", np.full(frames, 0.25), 44_100, subtype="FLOAT")
    audio = load_audio(path)
    assert audio.shape == (math.ceil(frames * RATE / 44_100),)
    assert torch.isfinite(audio).all()
    assert load_audio(path, 44_100).tolist() == [0.25] * frames
