"""load_audio: what it reads, and what it refuses."""

import math
import os
import re
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from palkernels.model.audio import files as audio_files
from palkernels.model.audio.files import AudioError, load_audio

RATE = 16_000

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


def sine(frequency: float = 440.0, rate: int = RATE, seconds: float = 1.0, amplitude: float = 0.5) -> Any:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def noise(seconds: float = 1.0, rate: int = RATE) -> Any:
    return np.random.default_rng(0).uniform(-0.3, 0.3, round(seconds * rate))


def write(path: Path, samples: Any, rate: int = RATE, format: str = "WAV", subtype: str | None = None) -> Path:
    soundfile.write(path, samples, rate, format=format, subtype=subtype)
    return path


def refusal(path: Path | str, **options: Any) -> str:
    """The message with which a file is refused, once it is known to be one line that names the file."""
    with pytest.raises(AudioError) as caught:
        load_audio(path, **options)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"audio file {str(path)!r} must ")
    assert ", got " in message
    return message


def track_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that receives the number of frames of each read from now on."""
    reads: list[int] = []
    original = soundfile.SoundFile.read

    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = original(self, *args, **kwargs)
        reads.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    return reads


# What it reads


@pytest.mark.parametrize(("format", "subtype", "tolerance"), FORMATS)
def test_formats(tmp_path: Path, format: str, subtype: str, tolerance: float) -> None:
    samples = sine()
    audio = load_audio(write(tmp_path / "a", samples, format=format, subtype=subtype))
    assert audio.dtype == torch.float32
    assert audio.shape == (RATE,)
    assert audio.device.type == "cpu"
    middle = slice(2000, -2000)  # lossy codecs ring at the ends
    np.testing.assert_allclose(audio.numpy()[middle], samples[middle], rtol=0, atol=tolerance)


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


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_resampling_keeps_frequency_and_amplitude(tmp_path: Path, rate: int) -> None:
    seconds = 1.5
    path = write(tmp_path / "a", sine(1000.0, rate, seconds), rate, subtype="FLOAT")
    audio = load_audio(path).numpy()
    assert len(audio) == math.ceil(round(seconds * rate) * RATE / rate)
    middle = audio[4000:20_000]  # one second, so a bin of the spectrum is 1 Hz
    assert np.abs(np.fft.rfft(middle)).argmax() == 1000
    np.testing.assert_allclose(np.sqrt(2 * np.mean(middle**2)), 0.5, rtol=0.01)


def test_resampling_removes_what_the_lower_rate_cannot_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sine(11_000.0, 48_000), 48_000, subtype="FLOAT")
    assert load_audio(path)[1000:-1000].abs().max() < 0.01


def test_sampling_rate_of_the_result(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sine(1000.0, 44_100), 44_100)
    audio = load_audio(path, 48_000).numpy()
    assert len(audio) == 48_000
    assert np.abs(np.fft.rfft(audio)).argmax() == 1000


@pytest.mark.parametrize("block", [1, 100, 4_999, 2**16])
@pytest.mark.parametrize(("rate", "target"), [(44_100, 16_000), (8_000, 16_000), (48_000, 16_000), (16_000, 11_025)])
def test_resampling_in_blocks_equals_resampling_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, target: int, block: int
) -> None:
    """The block length must not show: neither a seam between blocks nor a sample more or less at the end."""
    frames = min(150_001, 200 * block + 1)
    samples = np.random.default_rng(0).uniform(-1, 1, frames).astype(np.float32)
    monkeypatch.setattr(audio_files, "BLOCK_FRAMES", block)
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
    """A program that writes into a pipe cannot go back to fill in the lengths: this is no file cut short."""
    path = write(tmp_path / "a", sine())
    data = bytearray(path.read_bytes())
    assert data[36:40] == b"data"
    data[4:8] = data[40:44] = b"\xff" * 4
    path.write_bytes(data)
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
    audio = load_audio(path, max_seconds=9.0)
    assert 8 * RATE <= len(audio) <= 8.2 * RATE


# What it refuses


def test_refuses_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.wav").endswith("must exist, got no such file")


def test_refuses_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("must be a file, got a directory")


def test_refuses_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.wav"
    path.touch()
    assert refusal(path).endswith("must hold audio, got an empty file")


def test_refuses_pipe_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").endswith("must be a regular file, got a device, pipe or socket")


def test_refuses_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "must be readable, got " in refusal(loop)
    assert "must be readable, got " in refusal(str(tmp_path / "nul\0byte"))

    path = write(tmp_path / "a", sine())

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # a mode of 0 would not stop a test that runs as root
    assert refusal(path).endswith("must be readable, got Permission denied")


def test_line_breaks_in_a_name_stay_inside_the_line(tmp_path: Path) -> None:
    refusal(tmp_path / "two\nlines\r.wav")


def test_size_is_checked_before_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", sine())

    def opened(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the file was opened")

    monkeypatch.setattr("builtins.open", opened)
    assert refusal(path, max_bytes=1000).endswith(f"must have at most 1000 bytes, got {path.stat().st_size}")


@pytest.mark.parametrize("content", [b"\0" * 5000, b"just text\n" * 500, bytes(range(256)) * 20, b"RIFF", b"x"])
def test_refuses_what_is_not_audio(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    assert "must hold intact WAV, FLAC, OGG or MP3 audio, got " in refusal(path)


def test_refuses_other_formats(tmp_path: Path) -> None:
    path = write(tmp_path / "a", sine(), format="AIFF")
    assert refusal(path).endswith("must be WAV, FLAC, OGG or MP3, got AIFF")


@pytest.mark.parametrize("format", ["WAV", "OGG"])
def test_refuses_no_samples(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "a", np.zeros(0), format=format)
    assert refusal(path).endswith("must hold at least one sample, got none")


@pytest.mark.parametrize(
    ("format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "IMA_ADPCM"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_refuses_truncated(tmp_path: Path, format: str, subtype: str, kept: float) -> None:
    """libsndfile reads the rest of a truncated WAV, OGG or MP3 file without a word."""
    path = write(tmp_path / "a", noise(4.0), format=format, subtype=subtype)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    message = refusal(path)
    assert "must be whole, got one cut short: " in message or "must hold intact " in message


def test_refuses_truncated_mp3_behind_a_long_tag(tmp_path: Path) -> None:
    """The header with the length is behind the tag, whose size is written in digits of seven bits."""
    path = write(tmp_path / "a", noise(4.0), format="MP3")
    tag = b"ID3\x04\0\0" + bytes([0, 2, 0x10, 0]) + bytes((2 << 14) + (0x10 << 7))  # 34,816 bytes of padding
    data = tag + path.read_bytes()
    path.write_bytes(data)
    assert load_audio(path).shape == (4 * RATE,)
    path.write_bytes(data[: -len(data) // 8])
    assert "must be whole, got one cut short: " in refusal(path)


def test_refuses_truncated_big_endian_wav_with_other_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a"
    soundfile.write(path, noise(), RATE, format="WAV", subtype="PCM_16", endian="BIG")
    data = path.read_bytes()
    assert data[:4] == b"RIFX"
    data = data[:12] + b"odd " + struct.pack(">I", 3) + b"abc\0" + data[12:]
    path.write_bytes(data)
    assert load_audio(path).shape == (RATE,)
    path.write_bytes(data[:-1])
    assert refusal(path).endswith("cut short: 32000 bytes of samples are announced and 31999 are there")


def test_refuses_ogg_without_its_last_page(tmp_path: Path) -> None:
    """Cut between two pages, an OGG file looks whole but for the missing mark of its end."""
    path = write(tmp_path / "a", noise(4.0), format="OGG")
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS")])
    assert 0 < soundfile.info(path).frames < 4 * RATE
    assert refusal(path).endswith("cut short: its last page is not marked as the end of the stream")


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_refuses_damage_in_the_middle(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "a", noise(4.0), format=format)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half : half + 3000] = bytes(3000)
    path.write_bytes(data)
    message = refusal(path)
    assert "must be whole, got one cut short: " in message or "must hold intact " in message


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


def test_refuses_many_channels(tmp_path: Path) -> None:
    path = write(tmp_path / "a", np.zeros((100, 65)))
    assert refusal(path).endswith("must have 1 to 64 channels, got 65")
    assert load_audio(write(tmp_path / "b", np.zeros((100, 64)))).shape == (100,)


def test_too_long_by_its_header_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "silence.flac", np.zeros(601 * RATE), format="FLAC")
    assert path.stat().st_size < 100_000  # small on disk, ten minutes in memory
    reads = track_reads(monkeypatch)
    assert refusal(path).endswith("must be at most 600 s long, got 601.00 s by its header")
    assert reads == []


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_decoding_stops_at_the_limit_whatever_the_header_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int
) -> None:
    path = write(tmp_path / "silence.flac", np.zeros(60 * rate), rate, "FLAC")
    monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda self: 10))
    reads = track_reads(monkeypatch)
    assert refusal(path, max_seconds=5.0).endswith("must be at most 5 s long, got more when decoded")
    assert sum(reads) == 5 * rate + 1


def test_mp3_without_a_stated_length_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", noise(8.0), format="MP3")
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], 64) :])
    reads = track_reads(monkeypatch)
    assert refusal(path, max_seconds=2.0).endswith("must be at most 2 s long, got more when decoded")
    assert sum(reads) == 2 * RATE + 1


def test_refuses_flac_that_leaves_its_length_open(tmp_path: Path) -> None:
    path = write(tmp_path / "a", noise(), format="FLAC")
    data = bytearray(path.read_bytes())
    assert data[:4] == b"fLaC"
    data[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert refusal(path).endswith("must state its length, got a header that leaves it open")


def test_refuses_every_mutilated_header_in_one_line(tmp_path: Path) -> None:
    """Whatever a header says after a few random bytes, a file is read within the limits or refused."""
    random = np.random.default_rng(0)
    path = tmp_path / "a"
    messages = []
    for format in ("WAV", "FLAC", "OGG"):
        data = write(path, noise(0.2), format=format).read_bytes()
        for _ in range(60):
            broken = bytearray(data)
            for at in random.integers(0, 64, 3):
                broken[at] = random.integers(256)
            path.write_bytes(broken)
            try:
                audio = load_audio(path, max_seconds=100.0)
            except AudioError as error:
                messages.append(str(error))
            else:
                assert 0 < len(audio) <= 100 * RATE
    assert len(messages) > 60
    assert all(len(message.splitlines()) == 1 for message in messages)


# Its own arguments and its imports


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
    with pytest.raises(ImportError, match=re.escape("pip install palkernels[audio]")):
        load_audio(tmp_path / "a.wav")


def test_module_imports_without_the_audio_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("soundfile", "torchaudio"):
        monkeypatch.setitem(sys.modules, package, None)
    module = runpy.run_path(audio_files.__file__)
    assert module["load_audio"].__name__ == "load_audio"
