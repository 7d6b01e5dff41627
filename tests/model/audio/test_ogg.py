"""OGG files as recorders leave them: without a mark of their end, several in a row, pages lost or changed."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from support.sounds import noise, refusal, sine, write

from palkernels.model import AudioError, load_audio
from palkernels.model.audio.ogg_packets import durations

FAULT = "an OGG stream whose last page is not marked as its end"
CODECS = pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])


def crc(page: bytes) -> int:
    """The checksum of a page, bit by bit as the format defines it."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


def pages_of(path: Path) -> list[bytearray]:
    data, pages, at = path.read_bytes(), [], 0
    while at < len(data):
        count = data[at + 26]
        size = 27 + count + sum(data[at + 27 : at + 27 + count])
        pages.append(bytearray(data[at : at + size]))
        at += size
    return pages


def with_checksum(page: bytearray) -> bytearray:
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", crc(bytes(page)))
    return page


def unmarked(pages: list[bytearray]) -> list[bytearray]:
    last = bytearray(pages[-1])
    assert last[5] & 4
    last[5] &= ~4
    return [*pages[:-1], with_checksum(last)]


def save(path: Path, *pages: bytearray) -> Path:
    path.write_bytes(b"".join(pages))
    return path


@CODECS
@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.3, 4.0])
@pytest.mark.parametrize("sound", ["sine", "noise", "fading"])
def test_no_mark_of_the_end(tmp_path: Path, codec: str, rate: int, seconds: float, sound: str) -> None:
    """As muxers on phones write whole voice notes. What is read is what is read with the mark."""
    samples = sine(rate=rate, seconds=seconds) if sound == "sine" else noise(seconds, rate)
    if sound == "fading":
        samples *= np.linspace(1, 0, len(samples)) ** 4
    path = write(tmp_path / "a", samples, rate, "OGG", codec)
    marked = load_audio(path, rate)
    assert marked.shape == samples.shape
    save(path, *unmarked(pages_of(path)))
    with pytest.warns(UserWarning, match=f"should be free of faults, got {FAULT}: {seconds:.2f} s are read$"):
        audio = load_audio(path, rate)
    assert torch.equal(audio, marked)
    assert refusal(path, strict=True).endswith(f"must be free of faults with strict=True, got {FAULT}")


@CODECS
def test_cut_between_two_pages(tmp_path: Path, codec: str) -> None:
    """A full last page that ends where its packets end is no end: the stream goes on."""
    path = write(tmp_path / "a", sine(seconds=7.0) if codec == "OPUS" else noise(7.0), format="OGG", subtype=codec)
    pages = pages_of(path)
    for kept in range(5, len(pages)):
        save(path, *pages[:kept])
        assert refusal(path).endswith("cut short: its last page is not marked as the end of the stream")


@CODECS
def test_a_page_for_the_end_alone(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path / "a", noise(2.0, 48_000)[: 80 * 960 - 312], 48_000, "OGG", codec)
    frames = soundfile.info(path).frames
    pages = unmarked(pages_of(path))
    end = bytearray(b"OggS\0\4" + pages[-1][6:18] + struct.pack("<I", len(pages)) + bytes(5))
    if codec == "VORBIS":
        assert load_audio(save(path, *pages, with_checksum(end)), 48_000, strict=True).shape == (frames,)


@CODECS
def test_several_streams(tmp_path: Path, codec: str) -> None:
    """libsndfile reads the first, whether they follow one another or alternate, and whatever their numbers are."""
    path = write(tmp_path / "a", noise(4.0), format="OGG", subtype=codec)
    first, second = pages_of(path), pages_of(path)
    for page in second:
        page[14:18] = b"abcd"
        with_checksum(page)
    for pages in (
        [*first, *first],
        [*first, *second],
        [*unmarked(first), *second],
        [first[0], second[0], *first[1:], *second[1:]],
    ):
        save(path, *pages)
        assert soundfile.info(path).frames == 64_000
        message = "must hold one stream, got 2 OGG streams in one file: ffmpeg -i in.ogg out.wav converts it"
        assert refusal(path).endswith(message)
    save(path, *first, first[-2])
    assert refusal(path).endswith("must be one OGG stream, got 1 pages behind its end")


@CODECS
def test_pages_lost_or_changed(tmp_path: Path, codec: str) -> None:
    """libsndfile reads on behind a gap, and may fill it."""
    path = write(tmp_path / "a", noise(4.0), format="OGG", subtype=codec)
    pages = pages_of(path)
    save(path, *pages[:3], *pages[4:])
    assert refusal(path).endswith("must be whole, got an OGG stream whose page 4 follows 2")
    changed = [bytearray(page) for page in pages]
    changed[3][100] ^= 1
    save(path, *changed)
    at = sum(map(len, pages[:3]))
    assert refusal(path).endswith(f"must hold intact WAV, FLAC, OGG or MP3 audio, got an OGG page changed at byte {at}")
    nowhere = bytearray(pages[-1])
    nowhere[6:14] = b"\xff" * 8
    save(path, *pages[:-1], with_checksum(nowhere))
    assert refusal(path).endswith("must state the position of every page, got an OGG page without one")


def test_what_stands_between_pages_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a", noise(4.0), format="OGG")
    alone, pages = load_audio(path), pages_of(path)
    save(path, *pages[:3], bytearray(500), *pages[3:], bytearray(2**18))
    assert torch.equal(load_audio(path, strict=True), alone)


@CODECS
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_durations_of_packets(tmp_path: Path, codec: str, rate: int, channels: int) -> None:
    """The durations of all packets up to a page add up to the position that the encoder states there."""
    samples = np.stack([noise(5.0, rate)] * channels, axis=1) * np.linspace(1, 0, 5 * rate)[:, None] ** 8
    pages = pages_of(write(tmp_path / "a", samples, rate, "OGG", codec))
    packets, packet, ends = [], b"", []
    for page in pages:
        at = 27 + page[26]
        for length in page[27:at]:
            packet, at = packet + page[at : at + length], at + length
            if length < 255:
                packets.append(packet)
                packet = b""
        ends.append((len(packets), struct.unpack("<Q", page[6:14])[0]))
    headers = 3 if codec == "VORBIS" else 2
    samples_of = durations(packets[:3])
    assert samples_of is not None
    # Vorbis' first packet of sound gives no samples; Opus' first one gives as many as any.
    sound = packets[headers:] if codec == "VORBIS" else packets[headers - 1 :]
    for count, position in ends[2:-1]:
        assert sum(samples_of(sound[: count - headers + (codec == "OPUS")])) == position
    assert durations([b"Speex   "]) is None


@CODECS
def test_pages_of_a_stream_that_does_not_begin(tmp_path: Path, codec: str) -> None:
    """As where two recordings were joined and the second one's first page was left out: libsndfile reads the first."""
    first = write(tmp_path / "a", noise(2.0), 16_000, "OGG", codec)
    pages, others = pages_of(first), pages_of(write(tmp_path / "b", noise(1.0), 16_000, "OGG", codec))[1:]
    for page in others:
        page[14:18] = b"else"
    path = save(tmp_path / "c", *pages, *map(with_checksum, others))
    assert soundfile.info(path).frames == 32_000
    assert "must hold one stream, got OGG pages of another one without its beginning: ffmpeg" in refusal(path)


@CODECS
def test_a_last_position_before_others(tmp_path: Path, codec: str) -> None:
    """libsndfile takes the last page's position for the stream's length."""
    pages = pages_of(write(tmp_path / "a", noise(6.0), 16_000, "OGG", codec))
    (last,) = struct.unpack("<Q", pages[-1][6:14])
    pages[-1][6:14] = struct.pack("<Q", last // 2)
    path = save(tmp_path / "a", *pages[:-1], with_checksum(pages[-1]))
    assert f"must state positions that do not decrease, got an OGG page at sample {last // 2} behind" in refusal(path)


@CODECS
@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.3, 4.0])
@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_positions_that_do_not_fit_the_packets(
    tmp_path: Path, codec: str, rate: int, seconds: float, scale: float
) -> None:
    """Halved on every page they look in order: libsndfile reads half of the clip, and nothing is missing."""
    path = write(tmp_path / "a", noise(seconds, rate), rate, "OGG", codec)
    pages = pages_of(path)
    for page in pages:
        (position,) = struct.unpack("<Q", page[6:14])
        page[6:14] = struct.pack("<Q", int(position * scale))
        with_checksum(page)
    save(path, *pages)
    message = refusal(path)
    assert "must state positions that fit its packets, got an OGG page of " in message
    assert message.endswith(": ffmpeg -i in.ogg out.wav converts it")


@CODECS
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_positions_of_clips_of_any_length_fit_their_packets(tmp_path: Path, codec: str, rate: int) -> None:
    for samples in (1, 1_000, 9_999, 123_456):
        for sound in (noise(samples / rate, rate), np.zeros(samples), sine(rate=rate, seconds=samples / rate)):
            path = write(tmp_path / "a", sound, rate, "OGG", codec)
            assert load_audio(path, rate, strict=True).numel() == samples


def test_a_first_packet_on_two_pages(tmp_path: Path) -> None:
    """It is read, or refused by name."""
    head, *rest = pages_of(write(tmp_path / "a", noise(), 16_000, "OGG", "OPUS"))
    content = bytes(head[28:]).ljust(255, b"\0")
    begin = head[:6] + b"\xff" * 8 + head[14:26] + bytes([1, 255]) + content  # no packet ends on it
    end = head[:5] + bytes([1]) + head[6:18] + struct.pack("<I", 1) + head[22:26] + bytes([1, 0])
    for number, page in enumerate(rest, 2):
        page[18:22] = struct.pack("<I", number)
    path = save(tmp_path / "a", *(with_checksum(bytearray(page)) for page in (begin, end, *rest)))
    with contextlib.suppress(AudioError):
        assert load_audio(path, 16_000).numel() == 16_000
