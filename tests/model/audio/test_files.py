"""load_audio: what it reads, and how it reads it."""

import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.sounds import RATE, noise, refusal, sine, track_reads, write

from palkernels.model import AudioError, load_audio
from palkernels.model.audio import files, resampling
from palkernels.model.audio.files import clip_length

# Format, subtype, and how far decoded samples may be from the written ones, for a sine of amplitude 0.5.
FORMATS = [
    ("WAV", "PCM_U8", 1 / 127),
    ("WAV", "PCM_16", 1 / 2**15),
    ("WAV", "PCM_24", 1 / 2**23),
    ("WAV", "PCM_32", 1e-7),
    ("WAV", "FLOAT", 1e-7),
    ("WAV", "DOUBLE", 1e-7),
    ("WAVEX", "PCM_16", 1 / 2**15),
    ("RF64", "PCM_16", 1 / 2**15),
    ("FLAC", "PCM_S8", 1 / 127),
    ("FLAC", "PCM_16", 1 / 2**15),
    ("FLAC", "PCM_24", 1 / 2**23),
    ("OGG", "VORBIS", 0.03),
    ("OGG", "OPUS", 0.05),
    ("MP3", "MPEG_LAYER_III", 0.05),
]


@pytest.mark.parametrize(("format", "subtype", "tolerance"), FORMATS)
def test_formats(tmp_path: Path, format: str, subtype: str, tolerance: float) -> None:
    samples = sine()
    audio = load_audio(write(tmp_path / "a", samples, format=format, subtype=subtype))
    assert audio.dtype == torch.float32
    assert audio.shape == (RATE,)
    assert audio.device.type == "cpu"
    middle = slice(2000, -2000)  # lossy codecs ring at the ends
    np.testing.assert_allclose(audio.numpy()[middle], samples[middle], rtol=0, atol=tolerance)


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize(("format", "subtype", "tolerance"), FORMATS)
def test_lengths_without_decoding(
    tmp_path: Path, format: str, subtype: str, tolerance: float, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subtype == "OPUS":
        rate = 48_000  # it has no others
    path = write(tmp_path / "a", np.stack([sine(rate=rate, seconds=0.7)] * 2, axis=1), rate, format, subtype)
    samples = load_audio(path).numel()
    reads = track_reads(monkeypatch)
    length = clip_length(path)
    assert clip_length(path.read_bytes()) == length
    assert reads == []
    assert length == (round(0.7 * rate), rate)
    assert length.samples(RATE) == samples
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    if format not in ("FLAC", "MP3"):  # of which a missing end shows when they are decoded
        with pytest.raises(AudioError, match="cut short"):
            clip_length(path)


@pytest.mark.parametrize("ending", [".raw", ".mp3", ".txt", ""])
def test_content_decides_not_the_name(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"name{ending}", sine())
    assert torch.equal(load_audio(path), load_audio(str(path)))
    assert load_audio(path).shape == (RATE,)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_channels_are_averaged(tmp_path: Path, format: str, channels: int) -> None:
    amplitudes = np.linspace(0.1, 0.6, channels)
    samples = np.stack([sine(amplitude=amplitude) for amplitude in amplitudes], axis=1)
    audio = load_audio(write(tmp_path / "a", samples, format=format)).numpy()
    tolerance = 0.03 if format == "OGG" else 1e-4
    np.testing.assert_allclose(audio[2000:-2000], samples.mean(axis=1)[2000:-2000], rtol=0, atol=tolerance)


def test_stereo_mp3_is_averaged(tmp_path: Path) -> None:
    samples = np.stack([sine(), np.zeros(RATE)], axis=1)
    audio = load_audio(write(tmp_path / "a", samples, format="MP3")).numpy()
    np.testing.assert_allclose(audio[2000:-2000], samples.mean(axis=1)[2000:-2000], rtol=0, atol=0.03)


def test_opposite_channels_cancel(tmp_path: Path) -> None:
    samples = np.stack([sine(), -sine()], axis=1)
    assert load_audio(write(tmp_path / "a", samples, subtype="FLOAT")).abs().max() == 0


def test_limits_are_inclusive(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sine(seconds=2.0))
    size = path.stat().st_size
    assert load_audio(path, max_bytes=size, max_seconds=2.0).shape == (2 * RATE,)
    assert "must have at most" in refusal(path, max_bytes=size - 1)
    assert "must be at most" in refusal(path, max_seconds=2.0 - 1 / RATE)


def test_blocks_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", np.zeros((300_000, 6)), 48_000, "FLAC")
    reads = track_reads(monkeypatch)
    assert load_audio(path).shape == (100_000,)
    assert max(reads) <= 2**16
    assert sum(reads) == 300_000


def test_tags_behind_the_audio_are_not_audio(tmp_path: Path) -> None:
    """An old tag (ID3v1) behind the last frame made libsndfile fail when a read crossed the announced end."""
    for format in ("WAV", "FLAC", "OGG", "MP3"):
        path = write(tmp_path / format, noise(), format=format)
        alone = load_audio(path)
        path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
        assert torch.equal(load_audio(path), alone)


def test_streamed_wav_without_a_length(tmp_path: Path) -> None:
    """A program that writes into a pipe cannot go back to fill in the lengths: such a file is not cut short."""
    path = write(tmp_path / "a", sine())
    data = bytearray(path.read_bytes())
    assert data[36:40] == b"data"
    data[4:8] = data[40:44] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="got a header that states no length"):
        assert load_audio(path).shape == (RATE,)


def test_mp3_without_a_stated_length(tmp_path: Path) -> None:
    """Without a Xing header libsndfile guesses the length from the first bit rate: here silence, so too long.

    The guess must count neither as a length that the file fails to reach nor as one above the limit.
    """
    samples = np.concatenate([np.zeros(4 * RATE), noise(4.0)])
    path = write(tmp_path / "a", samples, format="MP3")
    data = path.read_bytes()
    assert b"Xing" in data[:64]
    path.write_bytes(data[data.index(data[:2], 64) :])  # the header sits in a frame of its own
    assert soundfile.info(path).frames > 10 * RATE
    with pytest.warns(UserWarning, match="got an MP3 without a tag that states its length"):
        audio = load_audio(path, max_seconds=9.0)
    assert 8 * RATE <= len(audio) <= 8.2 * RATE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_rate": 0}, "sampling_rate must be 1000 to 768000 Hz, got 0"),
        ({"sampling_rate": 16_000.0}, "sampling_rate must be an integer, got 16000.0"),
        ({"sampling_rate": True}, "sampling_rate must be an integer, got True"),
        ({"max_bytes": 0}, "max_bytes must be positive, got 0"),
        ({"max_seconds": -1.0}, "max_seconds must be positive and finite, got -1.0"),
        ({"max_seconds": math.inf}, "max_seconds must be positive and finite, got inf"),
        ({"max_seconds": math.nan}, "max_seconds must be positive and finite, got nan"),
    ],
)
def test_own_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as caught:
        load_audio(write(tmp_path / "a", sine()), **options)
    assert not isinstance(caught.value, AudioError)  # the caller's mistake, not the file's


@pytest.mark.parametrize("package", ["soundfile", "torchaudio"])
def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"load_audio needs {package}: pip install 'palkernels\[audio\]'"):
        load_audio(tmp_path / "a.wav")


def test_module_imports_without_the_audio_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("soundfile", "torchaudio"):
        monkeypatch.setitem(sys.modules, package, None)
    module = runpy.run_path(files.__file__)
    assert module["load_audio"].__name__ == "load_audio"
    assert runpy.run_path(resampling.__file__)["resample"].__name__ == "resample"


@pytest.mark.parametrize("format", ["WAV", "RF64", "FLAC", "OGG", "MP3"])
def test_bytes_are_read_as_the_file_is(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "a", noise(), format=format)
    assert torch.equal(load_audio(path.read_bytes(), 8_000), load_audio(path, 8_000))


def test_bytes_of_an_unfinished_file_are_read_with_a_warning(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a", noise()).read_bytes())
    data[40:44] = bytes(4)
    with pytest.warns(UserWarning, match="audio file in memory should be free of faults, got a header that states no"):
        assert load_audio(bytes(data)).shape == (RATE,)
