"""FLAC files whose header states fewer samples than there are: libsndfile leaves the rest out."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from support.sounds import RATE, noise, refusal, sine, write

from palkernels.model import AudioError, load_audio


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


def left_open(data: bytes) -> bytes:
    """The file as an encoder leaves it that writes to a pipe: without the 36 bits that count the samples."""
    return data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]


@pytest.mark.parametrize("tag", [b"", b"TAG" + bytes(125)], ids=["", "ID3v1"])
@pytest.mark.parametrize("sound", [noise(), sine(), np.zeros(RATE)], ids=["noise", "sine", "silence"])
def test_reads_all_where_the_header_states_no_length(tmp_path: Path, sound: np.ndarray, tag: bytes) -> None:
    path = write(tmp_path / "a", sound, format="FLAC")
    whole = load_audio(path, strict=True)
    path.write_bytes(left_open(path.read_bytes()) + tag)
    with pytest.warns(UserWarning, match=r"got a header that states no length: 1\.00 s are read"):
        assert torch.equal(load_audio(path), whole)
    with pytest.raises(AudioError, match="must be free of faults with strict=True, got a header that states no length"):
        load_audio(path, strict=True)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.999])
def test_refuses_one_that_states_no_length_and_is_cut_short(tmp_path: Path, kept: float) -> None:
    path = write(tmp_path / "a", noise(), format="FLAC")
    data = left_open(path.read_bytes())
    path.write_bytes(data[: int(len(data) * kept)])
    assert refusal(path).endswith("got one cut short: it states no length, and its last frame is incomplete")


def test_refuses_one_that_states_no_length_and_has_no_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a", noise(), format="FLAC")
    data = left_open(path.read_bytes())
    path.write_bytes(data[: data.index(b"\xff\xf8", 42)])
    assert refusal(path).endswith("must state its length, got a header that leaves it open")


def test_zeros_behind_a_file_hide_nothing(tmp_path: Path) -> None:
    """A recorder may set aside room and state a length before it is through."""
    data = bytearray(write(tmp_path / "a", noise(), format="FLAC").read_bytes())
    (tmp_path / "a").write_bytes(data + bytes(2**21))
    assert load_audio(tmp_path / "a").shape == (RATE,)
    data[22:26] = (RATE // 2).to_bytes(4, "big")
    (tmp_path / "a").write_bytes(data + bytes(2**21))
    assert "must state its length, got 8000 samples for 16000" in refusal(tmp_path / "a")


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
