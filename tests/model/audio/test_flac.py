"""FLAC files whose header states fewer samples than there are: libsndfile leaves the rest out."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.sounds import RATE, noise, refusal, sine, write

from palkernels.model import load_audio


@pytest.mark.parametrize("stated", [1, RATE // 2, RATE - 1])
@pytest.mark.parametrize("sound", [noise(), sine(), np.zeros(RATE)], ids=["noise", "sine", "silence"])
def test_refuses_a_header_that_states_less(tmp_path: Path, stated: int, sound: np.ndarray) -> None:
    path = write(tmp_path / "a", sound, format="FLAC")
    assert load_audio(path, strict=True).shape == (RATE,)
    data = bytearray(path.read_bytes())
    assert int.from_bytes(data[21:26], "big") & (2**36 - 1) == RATE
    data[22:26] = stated.to_bytes(4, "big")
    path.write_bytes(data)
    assert soundfile.info(path).frames == stated
    assert refusal(path).endswith(
        f"must state its length, got {stated} samples for 16000: ffmpeg -i in.flac out.wav converts it"
    )


def test_refuses_two_files_in_a_row(tmp_path: Path) -> None:
    data = write(tmp_path / "a", noise(), format="FLAC").read_bytes()
    (tmp_path / "a").write_bytes(data + data)
    assert soundfile.info(tmp_path / "a").frames == RATE
    assert "must hold one stream, got several FLAC streams in one file: ffmpeg -i in.flac" in refusal(tmp_path / "a")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_whole_files(tmp_path: Path, rate: int, subtype: str) -> None:
    samples = np.stack([noise(3.0, rate), sine(rate=rate, seconds=3.0)], axis=1)
    assert load_audio(write(tmp_path / "a", samples, rate, "FLAC", subtype), rate, strict=True).shape == (3 * rate,)
