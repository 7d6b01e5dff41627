"""Files that were cut short or damaged, most of which libsndfile reads without a word."""

import struct
from pathlib import Path

import pytest
import soundfile
from support.sounds import RATE, noise, refusal, write

from palkernels.model import load_audio


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


@pytest.mark.parametrize(
    ("start", "format", "ending"),
    [
        (b"\0\0\0\x20ftypM4A \0\0\0\0", "MP4 or M4A (AAC)", "m4a"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "MP4 or M4A (AAC)", "m4a"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81", "WebM or Matroska", "webm"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9", "WMA or ASF", "wma"),
        (b"\xff\xf1\x50\x80\x2e\x7f\xfc", "AAC", "aac"),
        (b"#!AMR\n", "AMR", "amr"),
        (b"BW64\xff\xff\xff\xffWAVEds64", "BW64", "wav"),
    ],
)
def test_formats_that_have_to_be_converted(tmp_path: Path, start: bytes, format: str, ending: str) -> None:
    path = tmp_path / "voice.mp3"  # the content decides
    path.write_bytes(start + bytes(range(256)) * 20)
    message = f"must be WAV, FLAC, OGG or MP3, got {format}: ffmpeg -i in.{ending} out.wav converts it"
    assert refusal(path).endswith(message)


@pytest.mark.parametrize(
    ("format", "ending"),
    [("W64", "w64"), ("AIFF", "aiff"), ("CAF", "caf"), ("AU", "au"), ("NIST", "sph"), ("VOC", "voc")],
)
@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_formats_of_libsndfile_that_are_not_checked(tmp_path: Path, format: str, ending: str, kept: float) -> None:
    """They are refused, cut short or not, since what is missing would not show."""
    path = write(tmp_path / "a", noise(), format=format, subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    message = f"must be WAV, FLAC, OGG or MP3, got {format}: ffmpeg -i in.{ending} out.wav converts it"
    assert refusal(path).endswith(message)


def test_rare_formats_of_libsndfile(tmp_path: Path) -> None:
    """The way that the message names leads to a file that is read."""
    path = write(tmp_path / "a", noise(), format="PVF", subtype="PCM_16")
    way = "soundfile.write(out, *soundfile.read(file)) converts it"
    assert refusal(path).endswith(f"must be WAV, FLAC, OGG or MP3, got PVF: {way}")
    soundfile.write(tmp_path / "b.wav", *soundfile.read(path))
    assert load_audio(tmp_path / "b.wav").shape == (RATE,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"])
def test_strict_takes_whole_files(tmp_path: Path, format: str) -> None:
    assert load_audio(write(tmp_path / "a", noise(), format=format), strict=True).shape == (RATE,)
