"""Sounds in files of any format, and how `load_audio` refuses one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from palkernels.model import AudioError, load_audio

RATE = 16_000


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
