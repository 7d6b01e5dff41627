"""load_audio: files that it refuses, in one line each."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from support.sounds import RATE, noise, refusal, sine, track_reads, write

from palkernels.model import AudioError, load_audio


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


@pytest.mark.parametrize("format", ["WAV", "OGG"])
def test_refuses_no_samples(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "a", np.zeros(0), format=format)
    assert refusal(path).endswith("must hold at least one sample, got none")


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


@pytest.mark.filterwarnings("ignore:audio file:UserWarning")
def test_refuses_every_mutilated_header_in_one_line(tmp_path: Path) -> None:
    """Whatever a header says after a few random bytes, a file is read within the limits or refused."""
    random = np.random.default_rng(0)
    path = tmp_path / "a"
    messages = []
    for format in ("WAV", "RF64", "FLAC", "OGG", "MP3"):
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
