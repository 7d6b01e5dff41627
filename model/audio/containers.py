"""What the bytes of an audio file show that libsndfile does not report: a missing end, an MP3 without a length."""

from __future__ import annotations

import struct
from typing import BinaryIO

__all__ = ["states_mp3_length", "what_is_missing"]

# A WAV size from here on is what programs write that stream and cannot go back to fill it in.
RIFF_UNKNOWN_SIZE = 0x7FFF_0000
RIFF_MAX_CHUNKS = 1_000  # Chunks looked through for the samples. Real files have a handful.
OGG_MAX_PAGE = 65_307  # bytes, by the format's definition


def what_is_missing(file: BinaryIO, size: int) -> str | None:
    """Return what shows that a WAV or OGG file of `size` bytes was cut short, or None if nothing does.

    These are the two formats whose missing end libsndfile takes for the end: it trims a WAV file's length to the bytes
    that are there, and an OGG file's to its last whole page. Of other formats it reports a fault, or it delivers fewer
    frames than it announced.
    """
    magic = file.read(12)
    if magic[:4] == b"OggS":
        return _what_is_missing_from_ogg(file, size)
    if magic[:4] in (b"RIFF", b"RIFX") and magic[8:] == b"WAVE":
        return _what_is_missing_from_wav(file, size, "<" if magic[:4] == b"RIFF" else ">")
    return None


def _what_is_missing_from_ogg(file: BinaryIO, size: int) -> str | None:
    """The last page must be there to its last byte, and be marked as the end of its stream."""
    file.seek(max(0, size - 2 * OGG_MAX_PAGE))
    tail = file.read(2 * OGG_MAX_PAGE)
    at = tail.rfind(b"OggS")
    if at < 0:  # 64 KiB of something else behind the stream
        return None
    page = tail[at:]
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        return "its last page is incomplete"
    return None if page[5] & 4 else "its last page is not marked as the end of the stream"


def _what_is_missing_from_wav(file: BinaryIO, size: int, byte_order: str) -> str | None:
    """The chunk of samples must be as long as its header says."""
    at = 12
    for _ in range(RIFF_MAX_CHUNKS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return None
        (length,) = struct.unpack(byte_order + "I", head[4:])
        at += 8
        if head[:4] == b"data":
            if at + length <= size or length >= RIFF_UNKNOWN_SIZE:
                return None
            return f"{length} bytes of samples are announced and {size - at} are there"
        at += length + length % 2
    return None


def states_mp3_length(file: BinaryIO) -> bool:
    """Return whether an MP3's first frame holds its length (Xing, Info, VBRI). If not, libsndfile estimates it."""
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        # A tag stands before the audio. Its size has four digits of seven bits.
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(4096)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))
