"""WAV and RF64 files as recorders leave them: lengths that are not stated, chunks that are not padded."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sounds import RATE, noise, refusal, write

from palkernels.model import load_audio

SAMPLES = np.round(noise() * 2**15).astype("<i2")
DATA = SAMPLES.tobytes()
FORMAT = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)


def chunk(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(data) if size is None else size) + data


def wav(*chunks: bytes, riff: int | None = None) -> bytes:
    return chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", FORMAT) + b"".join(chunks), riff)


def rf64(tmp_path: Path, size: int, samples: Any = SAMPLES) -> bytes:
    """An RF64 file whose header states `size` bytes of samples."""
    data = bytearray(write(tmp_path / "rf64", samples, format="RF64", subtype="PCM_16").read_bytes())
    assert data[12:16] == b"ds64"
    assert data[28:36] == struct.pack("<Q", len(DATA))
    data[28:36] = struct.pack("<Q", size)
    return bytes(data)


def read(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return load_audio(path)


def check(audio: Any, samples: Any = SAMPLES) -> None:
    np.testing.assert_array_equal(audio.numpy(), samples.astype("f4") / 2**15)


@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0x7FFF_FFFF, 0xFFFF_FFFF - 36, 0xFFFF_FFFF], ids=hex)
@pytest.mark.parametrize("riff", [0, None, 0xFFFF_FFFF])
@pytest.mark.parametrize("before", [b"", chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"abc"))], ids=["", "odd"])
def test_a_length_that_was_never_filled_in(tmp_path: Path, size: int, riff: int | None, before: bytes) -> None:
    """All samples are read, with a warning; a size of zero made libsndfile read none, an odd chunk refuse the file."""
    path = tmp_path / "a"
    with pytest.warns(UserWarning, match=r"got a header that states no length \(32000 bytes .*: 1.00 s are read$"):
        audio = read(path, wav(before, chunk(b"data", DATA, size), riff=riff))
    check(audio)
    assert "must be free of faults with strict=True, got a header that states no length" in refusal(path, strict=True)


@pytest.mark.parametrize("samples", [np.zeros(RATE, "i2"), np.r_[np.zeros(RATE, "i2"), SAMPLES]], ids=["all", "first"])
def test_silence_is_not_padding(tmp_path: Path, samples: Any) -> None:
    with pytest.warns(UserWarning, match="states no length"):
        check(read(tmp_path / "a", wav(chunk(b"data", samples.astype("<i2").tobytes(), 0))), samples)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("riff", [0, 36, 1000, None])
def test_whole_files_need_no_warning(tmp_path: Path, riff: int | None) -> None:
    """Whatever the outer size says, and whatever chunks or padding follow."""
    data, info = chunk(b"data", DATA), chunk(b"LIST", b"INFO")
    for chunks in (
        (data,),
        (data, info),
        (chunk(b"junk", b"abc") + b"\0", data, bytes(512)),
        (data, b"TAG" + bytes(125)),
    ):
        check(read(tmp_path / "a", wav(*chunks, riff=riff)))
    assert load_audio(tmp_path / "a", strict=True).shape == (RATE,)


@pytest.mark.parametrize(
    "odd",
    [chunk(b"junk", b"abc"), chunk(b"LIST", b"INFO" + chunk(b"ISFT", b"abc")), chunk(b"bext", bytes(5)) * 2],
    ids=["junk", "LIST", "two"],
)
def test_odd_chunks_that_are_not_padded(tmp_path: Path, odd: bytes) -> None:
    """libsndfile finds no samples behind them."""
    path = tmp_path / "a"
    with pytest.warns(UserWarning, match=r"got a chunk of odd length without the byte that pads it: 1.00 s are read$"):
        audio = read(path, wav(odd, chunk(b"data", DATA), chunk(b"LIST", b"INFO")))
    check(audio)
    assert "without the byte that pads it" in refusal(path, strict=True)


def test_samples_of_odd_length(tmp_path: Path) -> None:
    """Eight bits, an odd number of them, with and without a padding byte before the next chunk."""
    for rest in (b"", b"\0", b"\0" + chunk(b"LIST", b"INFO"), chunk(b"LIST", b"INFO")):
        eight = struct.pack("<HHIIHH", 1, 1, RATE, RATE, 1, 8)
        data = chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", eight) + chunk(b"data", bytes(range(255)) * 33) + rest)
        assert read(tmp_path / "a", data).shape == (255 * 33,)


def test_an_empty_file_with_a_chunk_behind(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(wav(chunk(b"data", b""), chunk(b"LIST", b"INFO")))
    assert refusal(path).endswith("must hold at least one sample, got none")


def test_a_header_that_states_too_little(tmp_path: Path) -> None:
    """Bytes that are in no chunk may be samples that came after the header: libsndfile leaves them out."""
    path = tmp_path / "a"
    path.write_bytes(wav(chunk(b"data", DATA, 1000)))
    assert refusal(path).endswith(
        "must state its length, got 1000 bytes of samples by its header and 31000 in no chunk"
    )
    path.write_bytes(rf64(tmp_path, 1000))
    assert refusal(path).endswith(
        "must state its length, got 1000 bytes of samples by its header and 31000 in no chunk"
    )
    with pytest.warns(
        UserWarning, match="32000 bytes of samples by its header and 500 in no chunk, which are left out"
    ):
        check(read(path, wav(chunk(b"data", DATA), bytes(range(250)) * 2)))


def test_rf64(tmp_path: Path) -> None:
    path = tmp_path / "a"
    check(read(path, rf64(tmp_path, len(DATA))))
    for size in (0, 2**64 - 1):
        with pytest.warns(UserWarning, match="got a header that states no length"):
            check(read(path, rf64(tmp_path, size)))
        assert "states no length" in refusal(path, strict=True)
    path.write_bytes(rf64(tmp_path, len(DATA))[:-1])
    assert refusal(path).endswith("cut short: 32000 bytes of samples are announced and 31999 are there")
    path.write_bytes(rf64(tmp_path, 2**40))
    assert refusal(path).endswith(f"cut short: {2**40} bytes of samples are announced and 32000 are there")


def test_too_many_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(wav(chunk(b"junk", b"") * 1_000, chunk(b"data", DATA)))
    assert refusal(path).endswith("must have its samples in the first 1000 chunks, got none there")


def test_mp3_in_a_wav_file(tmp_path: Path) -> None:
    """libsndfile reads it, and guesses its length as it does without a tag."""
    path = tmp_path / "a"
    data = write(path, np.concatenate([0.001 * noise(4.0), noise(4.0)]), format="MP3").read_bytes()
    frames = data[data.index(data[:2], 64) :]
    plain = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 4000, 1, 0, 12, 1, 2, 144, 1, 1393)
    path.write_bytes(chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", plain) + chunk(b"data", frames)))
    message = "must be WAV, FLAC, OGG or MP3, got MP3 in a WAV file: ffmpeg -i in.wav out.wav converts it"
    assert refusal(path).endswith(message)
    extended = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, 4000, 1, 0, 22, 0, 4) + struct.pack("<H", 0x55) + bytes(14)
    path.write_bytes(chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", extended) + chunk(b"data", frames)))
    assert refusal(path).endswith(message)


@pytest.mark.parametrize("between", [b"", chunk(b"LIST", b"INFO")], ids=["", "LIST"])
@pytest.mark.parametrize("riff", [None, 36 + len(DATA)], ids=["whole", "first"])
def test_several_chunks_of_samples(tmp_path: Path, between: bytes, riff: int | None) -> None:
    """As two files in a row, the second without its header, or a recording that was paused."""
    path = tmp_path / "a"
    path.write_bytes(wav(chunk(b"data", DATA), between, chunk(b"data", DATA), riff=riff))
    message = "must have its samples in one chunk, got several: ffmpeg -i in.wav out.wav converts it"
    assert refusal(path).endswith(message)
