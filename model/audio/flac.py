"""FLAC: whether the header states as many samples as the frames hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import BinaryIO

from palkernels.model.audio.inspection import Inspection, convert_with, cut_short
from palkernels.model.audio.limits import AudioError

__all__ = ["inspect_flac"]

STREAM = b"fLaC\0\0\0\x22"  # how a stream begins, with the header of its first block; or with the bit of the last block
LONE_STREAM = b"fLaC\x80\0\0\x22"
LONGEST_FRAME = 2**20  # bytes searched for the last frame
HEADERS_TRIED = 4  # the last frame's own, and bytes of its samples that look like one


def inspect_flac(file: BinaryIO, start: int, name: str) -> Inspection:
    """Check that nothing follows the samples that a FLAC stream from `start` on states: libsndfile would not read it.

    One that states none, as an encoder leaves it that cannot go back, has as many as its last frame says.

    Raises:
        AudioError: There are more samples than stated, several streams, or none stated and a last frame that is not
            all there.
    """
    file.seek(start)
    data = file.read()
    size = len(data)
    for mark in (STREAM, LONE_STREAM):
        if data.find(mark, len(STREAM)) >= 0:
            raise AudioError(
                f"{name} must hold one stream, got several FLAC streams in one file: {convert_with('flac')}"
            )
    if not data.startswith((STREAM, LONE_STREAM)) or size < 42:
        return Inspection()
    fixed_block = int.from_bytes(data[8:10], "big")
    stated = int.from_bytes(data[21:26], "big") & (2**36 - 1)
    if not stated:
        return _with_length(data, fixed_block, name)
    end = len(data.rstrip(b"\0"))  # a file may have been given room for more than was written
    _, last_sample = next(_frames_from_the_end(data, end, fixed_block), (0, 0))
    if last_sample > stated:
        way = convert_with("flac")
        raise AudioError(f"{name} must state its length, got {stated} samples for {last_sample}: {way}")
    return Inspection()


def _with_length(data: bytes, fixed_block: int, name: str) -> Inspection:
    """Return a stream that states no length with the one that its last frame tells, which must end where it does."""
    size = len(data) - (128 if data[-128:-125] == b"TAG" else 0)  # ID3v1
    frames = list(itertools.islice(_frames_from_the_end(data, size, fixed_block), HEADERS_TRIED))
    for at, last_sample in frames:
        if _crc(data[at:size], 16, 0x8005) == 0 and last_sample < 2**36:
            stated = (data[21] & 0xF0) << 32 | last_sample
            return Inspection("a header that states no length", data[:21] + stated.to_bytes(5, "big") + data[26:])
    if not frames:
        return Inspection()  # no frame at all: load_audio refuses a length that is left open
    raise cut_short(name, "it states no length, and its last frame is incomplete")


def _frames_from_the_end(data: bytes, end: int, fixed_block: int) -> Iterator[tuple[int, int]]:
    """Find what looks like frames' headers, from the last one on: where each is, and the sample behind its frame."""
    first = max(42, end - LONGEST_FRAME)
    while (end := data.rfind(b"\xff", first, end)) >= 0:
        last_sample = _end_of_frame(data[end : end + 16].ljust(16, b"\0"), fixed_block)
        if last_sample is not None:
            yield end, last_sample


def _end_of_frame(head: bytes, fixed_block: int) -> int | None:
    """Return the number of the sample behind the frame whose header these 16 bytes hold, or None if they hold none."""
    if head[1] & 0xFE != 0xF8 or head[3] & 1:
        return None
    block, rate, channels, depth = head[2] >> 4, head[2] & 15, head[3] >> 4, head[3] >> 1 & 7
    if block == 0 or rate == 15 or channels > 10 or depth == 3:
        return None
    extra = next((count for count in range(8) if not head[4] << count & 0x80), 8)  # UTF-8's number of bytes, extended
    if extra in (1, 8):
        return None
    at, number = 5, head[4] & (0xFF >> (extra + 1) if extra else 0x7F)
    for byte in head[5 : 4 + max(extra, 1)]:
        if byte & 0xC0 != 0x80:
            return None
        number, at = number << 6 | byte & 0x3F, at + 1
    if block in (6, 7):
        width = block - 5
        samples, at = int.from_bytes(head[at : at + width], "big") + 1, at + width
    else:
        samples = 192 if block == 1 else 576 << (block - 2) if block < 6 else 256 << (block - 8)
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if _crc(head[:at], 8, 0x07) != head[at]:
        return None
    return number + samples if head[1] & 1 else number * fixed_block + samples


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """Return a checksum; of data with their own behind them, which is that of a whole frame, it is 0."""
    value, top = 0, 1 << (bits - 1)
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = value << 1 ^ polynomial if value & top else value << 1
        value &= (top << 1) - 1
    return value
