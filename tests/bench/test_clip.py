"""The bundled clip: there, as described, and made by the script that is said to have made it."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from palkernels.bench.clip import bundled_clip
from palkernels.model.audio.files import load_audio

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_clip.py"


def test_clip_is_what_its_description_says() -> None:
    clip = bundled_clip()
    assert clip.stat().st_size < 400_000
    info = soundfile.info(clip)
    assert (info.format, info.subtype) == ("FLAC", "PCM_16")
    assert (info.samplerate, info.channels, info.frames) == (16_000, 1, 12 * 16_000)


def test_clip_loads_and_every_second_sounds() -> None:
    seconds = load_audio(bundled_clip()).view(12, 16_000)
    assert seconds.abs().max() < 0.99  # not clipped
    assert (seconds.square().mean(dim=1).sqrt() > 0.003).all()  # nowhere silent


def test_scenes_differ() -> None:
    """Half of the power lies below another frequency in each scene, rain being the one without a pitch."""
    samples = load_audio(bundled_clip()).numpy()
    median, flatness = [], []
    for start, end in ((0, 4), (4, 6.5), (6.5, 9), (9, 12)):
        scene = samples[int(start * 16_000) : int(end * 16_000)]
        power = np.abs(np.fft.rfft(scene)) ** 2 + 1e-9
        cumulated = np.cumsum(power) / power.sum()
        median.append(np.searchsorted(cumulated, 0.5) / len(scene) * 16_000)
        flatness.append(np.exp(np.log(power).mean()) / power.mean())
    melody, bird, rain, voice = median
    assert melody < 600
    assert voice < 900
    assert 2500 < bird < 6000
    assert 1000 < rain < 4000
    assert flatness[2] == max(flatness)


def test_script_reproduces_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "new folder" / "clip.flac"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    made, rate = soundfile.read(output, dtype="int16")
    committed, committed_rate = soundfile.read(bundled_clip(), dtype="int16")
    assert rate == committed_rate
    np.testing.assert_array_equal(made, committed)


def test_missing_clip_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palkernels.bench.clip.files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the bundled clip must be at '.*clip\.flac', got no such file"):
        bundled_clip()
