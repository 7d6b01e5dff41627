"""MP3 files without a tag that states their length, or with one that is wrong."""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.sounds import RATE, noise, refusal

from palkernels.model import load_audio

DELAY = 576  # samples before the sound, which a tag of LAME's has the decoder leave out


def swelling(rate: int, channels: int = 1) -> Any:
    """Two seconds near silence, then two of noise: what the first bit rate promises is far from what comes."""
    samples = np.concatenate([0.005 * noise(2.0, rate), noise(2.0, rate)])
    return samples if channels == 1 else np.stack([samples, samples / 2], axis=1)


def mp3(path: Path, samples: Any, rate: int = RATE, **options: Any) -> bytes:
    soundfile.write(path, samples, rate, format="MP3", **options)
    return path.read_bytes()


def tag_of(data: bytes) -> int:
    return max(data.find(b"Xing"), data.find(b"Info"))


def without_tag(data: bytes) -> bytes:
    """The file without its first frame, which holds the tag and nothing else."""
    return data[data.index(data[:2], tag_of(data)) :]


def read(path: Path, data: bytes, fault: str, rate: int = RATE) -> Any:
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=f"should be free of faults, got {re.escape(fault)}: "):
        audio = load_audio(path, rate)
    assert refusal(path, strict=True).endswith(f"must be free of faults with strict=True, got {fault}")
    return audio


UNTAGGED = "an MP3 without a tag that states its length"


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 1), (22_050, 2), (44_100, 1), (48_000, 2)])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_no_tag(tmp_path: Path, rate: int, channels: int, mode: str) -> None:
    """libsndfile stops at the length that it guesses by the first frame, a third of it here."""
    path = tmp_path / "a"
    data = mp3(path, swelling(rate, channels), rate, bitrate_mode=mode)
    tagged = load_audio(path, rate)
    assert tagged.shape == (4 * rate,)
    path.write_bytes(without_tag(data))
    guessed = soundfile.info(path).frames
    audio = read(path, without_tag(data), UNTAGGED, rate)
    if mode == "VARIABLE":
        assert guessed < 3.5 * rate
    assert 4 * rate <= len(audio) <= 4 * rate + 3 * 1152
    same = audio[DELAY : DELAY + 4 * rate]
    np.testing.assert_allclose(same[:-1152], tagged[:-1152], rtol=0, atol=0.01)  # frames of 16 bits overlap


def test_between_tags_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bare = without_tag(mp3(path, swelling(RATE)))
    alone = read(path, bare, UNTAGGED)
    before = b"ID3\x04\0\0" + bytes([0, 0, 8, 0]) + bytes(1024)
    for data in (before + bare, bare + b"TAG" + bytes(125), before + bare + b"APETAGEX" + bytes(300)):
        assert torch.equal(read(path, data, UNTAGGED), alone)


@pytest.mark.parametrize("stated", [None, 0, 10, 100])
def test_a_tag_that_states_less_than_there_is(tmp_path: Path, stated: int | None) -> None:
    """A tag that was written first and never again, or of the first of several files in a row."""
    path = tmp_path / "a"
    data = bytearray(mp3(path, swelling(RATE)))
    at = tag_of(bytes(data))
    (count,) = struct.unpack(">I", data[at + 8 : at + 12])
    if stated is None:
        data[at + 7] &= ~1
    else:
        data[at + 8 : at + 12] = struct.pack(">I", stated)
    fault = f"an MP3 whose tag states {stated} frames, of {count} that are there" if stated else UNTAGGED
    assert torch.equal(read(path, bytes(data), fault), read(path, without_tag(bytes(data)), UNTAGGED))


@pytest.mark.parametrize("tagged", [True, False])
def test_two_files_in_a_row(tmp_path: Path, tagged: bool) -> None:
    """As of FLAC and OGG, where the second one begins with a tag of its own."""
    path = tmp_path / "a"
    first, second = mp3(path, noise(3.0)), mp3(path, noise(2.0))
    first = first if tagged else without_tag(first)
    for between in (b"", b"TAG" + bytes(125), b"ID3\x04\0\0\0\0\0\x08" + bytes(8)):
        path.write_bytes(first + between + second)
        message = "must hold one stream, got 2 MP3 streams in one file: ffmpeg -i in.mp3 out.wav converts it"
        assert refusal(path).endswith(message)


def test_frames_in_a_row_are_one_stream(tmp_path: Path) -> None:
    """Where nothing tells the second file from frames of the first, such as a broadcast that was recorded in parts."""
    path = tmp_path / "a"
    first, second = mp3(path, noise(3.0)), without_tag(mp3(path, noise(2.0)))
    audio = read(path, first + second, "an MP3 whose tag states 86 frames, of 144 that are there")
    assert 5 * RATE <= len(audio) <= 5 * RATE + 6 * 576
    assert audio[-RATE:].abs().max() > 0.2
    bare = read(path, without_tag(first) + b"ID3\x04\0\0\0\0\0\x08" + bytes(8) + second, UNTAGGED)
    assert 5 * RATE <= len(bare) <= 5 * RATE + 6 * 576


def test_an_older_tag_behind_the_first(tmp_path: Path) -> None:
    """As programs leave it that put a tag before what is there."""
    path = tmp_path / "a"
    data = mp3(path, noise(2.0))
    tag = data[: len(data) - len(without_tag(data))]
    path.write_bytes(tag + data)
    assert 2 * RATE <= len(load_audio(path)) <= 2 * RATE + 3 * 576


def test_two_files_of_other_kinds_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = mp3(path, noise(2.0))
    for other in (mp3(path, noise(2.0, 22_050), 22_050), mp3(path, swelling(RATE, 2))):
        for first in (data, without_tag(data)):
            path.write_bytes(first + other)
            assert "must be one stream, got MP3 frames of several rates or channel counts: ffmpeg" in refusal(path)


def test_cut_short(tmp_path: Path) -> None:
    """A last frame that is not all there shows it, with and without a tag."""
    path = tmp_path / "a"
    data = mp3(path, swelling(RATE))
    path.write_bytes(data[:-20])
    assert refusal(path).endswith("cut short: 113 of 114 frames and a part of one")
    path.write_bytes(without_tag(data)[:-20])
    assert refusal(path).endswith("cut short: its last frame is incomplete")


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("where", ["middle", "end"])
@pytest.mark.parametrize("what", ["left out", "damaged"])
def test_a_single_frame_is_missed(tmp_path: Path, what: str, where: str, rate: int) -> None:
    """libsndfile reads on, a frame less. A tag of LAME's counts the frames behind it; others may count its own, too."""
    path = tmp_path / "a"
    data = mp3(path, noise(1.0, rate), rate, bitrate_mode="CONSTANT")
    starts = [found.start() for found in re.finditer(re.escape(data[:2]), data)]
    begin = starts[len(starts) // 2 if where == "middle" else -1]
    end = min([start for start in starts if start > begin], default=len(data))
    kept = b"" if what == "left out" else bytes(end - begin)
    path.write_bytes(data[:begin] + kept + data[end:])
    frames = len(starts) - 1
    assert f"must be whole, got one cut short: {frames - 1} of {frames} frames" in refusal(path)
    unsigned = data.replace(b"LAME", b"    ")
    path.write_bytes(unsigned[:begin] + unsigned[end:])
    assert load_audio(path, rate).numel() >= rate - 2 * 1152


def test_damage(tmp_path: Path) -> None:
    path = tmp_path / "a"
    bare = without_tag(mp3(path, noise(4.0)))
    path.write_bytes(bare[:2000] + bytes(2000) + bare[4000:])
    assert "must hold intact WAV, FLAC, OGG or MP3 audio, got no frame at byte 2" in refusal(path)


def test_free_format(tmp_path: Path) -> None:
    """Frames that do not say how long they are, without a tag."""
    path = tmp_path / "a"
    path.write_bytes((b"\xff\xfb\x00\xc4" + bytes(600)) * 20)
    assert "must state its bit rate, got an MP3 of free format without a length: ffmpeg -i in.mp3" in refusal(path)
