"""Bounds on samples and rates: one for files, arrays and features."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.sounds import RATE, noise, refusal, write

from palkernels.model import AudioError, load_audio
from palkernels.model.audio.features import SslamFeatures
from palkernels.model.audio.limits import check_amplitude
from palkernels.model.audio.waveforms import waveform


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_refuses_samples_that_are_not_audio(tmp_path: Path, rate: int, value: float) -> None:
    samples = np.zeros((3 * rate, 2))
    samples[2 * rate, 1] = value
    message = refusal(write(tmp_path / "a", samples, rate, subtype="DOUBLE"))
    match = re.search(r"must hold finite samples within 2\*\*31, got (\S+) near (\S+) s$", message)
    assert match is not None
    assert float(match[2]) == pytest.approx(2.0, abs=0.05)
    if rate == RATE:
        expected = np.float32(value) / 2
        assert float(match[1]) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_refuses_absurd_rates(tmp_path: Path, rate: int) -> None:
    path = write(tmp_path / "a", noise(0.1), rate)
    assert refusal(path).endswith(f"must have a sampling rate of 1000 to 768000 Hz, got {rate} Hz")


def test_refuses_rates_whose_resampler_would_fill_the_memory(tmp_path: Path) -> None:
    """A filter from 44,101 to 16,000 Hz takes 5 GB: a header alone must not be able to ask for that."""
    path = write(tmp_path / "a", noise(0.1), 44_101)
    assert refusal(path).endswith("got 44101 Hz (greatest common divisor 1)")
    assert load_audio(path, 44_101).shape == (1600,)  # no resampling


def by_file(samples: torch.Tensor, path: Path) -> None:
    load_audio(write(path / "a", samples.double().numpy(), subtype="DOUBLE"))


def by_array(samples: torch.Tensor, path: Path) -> None:
    waveform(samples.numpy(), RATE, RATE, max_seconds=1, max_bytes=10**6)


def by_features(samples: torch.Tensor, path: Path) -> None:
    SslamFeatures()([samples])


@pytest.mark.parametrize("entrance", [by_file, by_array, by_features])
@pytest.mark.parametrize(("value", "named"), [(math.nan, "nan"), (-math.inf, "-inf"), (-(2.0**32), "-4.29497e+09")])
def test_every_entrance_names_the_first_bad_sample(
    tmp_path: Path, entrance: Callable[[torch.Tensor, Path], None], value: float, named: str
) -> None:
    """A file, an array and an encoder's features are held to one bound, and say alike where a clip breaks it."""
    samples = torch.zeros(8_000, dtype=torch.float64)
    samples[4_000], samples[4_001] = value, math.nan
    message = f" must hold finite samples within 2**31, got {named} near 0.250 s"
    with pytest.raises(AudioError, match=f"{re.escape(message)}$"):
        entrance(samples, tmp_path)
    samples[4_000:4_002] = 2.0**31  # the bound itself is accepted
    entrance(samples, tmp_path)


def test_a_block_says_where_in_the_clip_it_stands() -> None:
    with pytest.raises(AudioError, match=r"^clip must hold finite samples .*, got inf near 1\.500 s$"):
        check_amplitude("clip", torch.tensor([0.0, math.inf]), sampling_rate=2, first_sample=2)
