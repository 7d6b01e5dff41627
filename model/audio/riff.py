"""WAV and RF64: whether the samples that the header states are there."""

from __future__ import annotations

import struct
from typing import BinaryIO

from palkernels.model.audio.inspection import Inspection, convert_with, cut_short
from palkernels.model.audio.limits import AudioError

__all__ = ["inspect_riff", "is_riff"]

BYTE_ORDERS = {b"RIFF": "<", b"RIFX": ">", b"RF64": "<"}
UNKNOWN_SIZE = 0x7FFF_0000  # From here on it is what programs write that stream and cannot go back to fill it in.
MAX_REST = 4_096  # bytes behind the samples that are taken for something else than samples
MAX_CHUNKS = 1_000  # Real files have a handful.
KNOWN_CHUNKS = (b"fmt ", b"data", b"fact", b"LIST", b"bext", b"JUNK", b"junk", b"PAD ", b"cue ", b"smpl", b"id3 ")
MPEG, EXTENSIBLE = (0x50, 0x55), 0xFFFE  # encodings: the length of the first two libsndfile guesses
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBE")  # which taggers of MP3 files put behind any file


def is_riff(magic: bytes) -> bool:
    """Return whether a file's first 12 bytes are those of a WAV or RF64 file."""
    return magic[:4] in BYTE_ORDERS and magic[8:] == b"WAVE"


def inspect_riff(file: BinaryIO, size: int, name: str) -> Inspection:
    """Return what is imperfect about a WAV or RF64 file of `size` bytes.

    libsndfile takes the end of the file for the end of the samples, and a length of zero at its word.

    Raises:
        AudioError: Fewer bytes of samples are there than the header states, they are in several chunks, or the chunks
            are too many.
    """
    file.seek(0)
    order = BYTE_ORDERS[file.read(4)]
    long_size: int | None = None  # of the samples, as RF64's own chunk states it
    unpadded: list[int] = []  # where bytes are missing that would make odd chunks even
    at = 12
    for _ in range(MAX_CHUNKS):
        head = _read(file, at, 8)
        if len(head) < 8:
            return Inspection()  # libsndfile says what is wrong with a file without samples
        kind, length = head[:4], int(struct.unpack(order + "I", head[4:])[0])
        at += 8
        if kind == b"data":
            if long_size is not None:  # libsndfile goes by it, whatever the chunk itself says
                length = long_size
            return _inspect_samples(file, size, name, order, at, length, long_size is not None, unpadded)
        if kind == b"fmt " and _encoding(_read(file, at, 26), order) in MPEG:
            raise AudioError(f"{name} must be WAV, FLAC, OGG or MP3, got MP3 in a WAV file: {convert_with('wav')}")
        if kind == b"ds64" and length >= 16:
            long_size = int(struct.unpack(order + "Q", _read(file, at + 8, 8).ljust(8, b"\0"))[0])
        at += length
        if length % 2:
            if _is_unpadded(file, at):
                unpadded.append(at)
            else:
                at += 1
    raise AudioError(f"{name} must have its samples in the first {MAX_CHUNKS} chunks, got none there")


def _inspect_samples(
    file: BinaryIO, size: int, name: str, order: str, at: int, length: int, is_long: bool, unpadded: list[int]
) -> Inspection:
    """Look at the chunk of samples, whose `length` bytes should begin at `at`."""
    present = max(size - at, 0)
    unknown = length >= 2**63 if is_long else length >= UNKNOWN_SIZE
    if length == 0 and present and not _ends_in_chunks(file, at, size, order, padding=False):
        unknown = True  # a header written before the samples, and never again
    if length > present and not unknown:
        raise cut_short(name, f"{length} bytes of samples are announced and {present} are there")
    if not unknown and _more_samples(file, at + length + length % 2, size, order):
        raise AudioError(f"{name} must have its samples in one chunk, got several: {convert_with('wav')}")
    if length > present or (unknown and length == 0):
        fault = f"a header that states no length ({present} bytes of samples are there)"
        return Inspection(fault, _mended(file, unpadded, at, present, order, is_long))
    if unpadded:
        fault = "a chunk of odd length without the byte that pads it"
        return Inspection(fault, _mended(file, unpadded, at, length, order, is_long))
    end = at + length
    if end + 1 >= size or any(_ends_in_chunks(file, start, size, order) for start in (end + length % 2, end)):
        return Inspection()
    rest = f"{length} bytes of samples by its header and {size - end} in no chunk"
    if size - end > MAX_REST:  # the header may have been written too early
        raise AudioError(f"{name} must state its length, got {rest}")
    return Inspection(f"{rest}, which are left out")


def _encoding(format: bytes, order: str) -> int:
    """Return the number of the samples' encoding, by the first 26 bytes of the chunk that describes it."""
    number, extended = (int.from_bytes(format[at : at + 2], "little" if order == "<" else "big") for at in (0, 24))
    return extended if number == EXTENSIBLE else number


def _is_unpadded(file: BinaryIO, at: int) -> bool:
    """Return whether the chunk behind an odd one begins at `at` itself, and not a byte later as it should."""
    return _read(file, at, 4) in KNOWN_CHUNKS and _read(file, at + 1, 4) not in KNOWN_CHUNKS


def _more_samples(file: BinaryIO, at: int, size: int, order: str) -> bool:
    """Return whether one of the chunks from `at` on holds samples: libsndfile does not open a file with several."""
    for _ in range(MAX_CHUNKS):
        head = _read(file, at, 8)
        if at >= size or len(head) < 8 or head[:4] == b"data":
            return head[:4] == b"data"
        at += 8 + int(struct.unpack(order + "I", head[4:])[0])
        at += at % 2
    return False


def _ends_in_chunks(file: BinaryIO, at: int, size: int, order: str, *, padding: bool = True) -> bool:
    """Return whether what follows `at` is nothing, a tag, or chunks up to the end of the file, or else padding."""
    for _ in range(MAX_CHUNKS):
        head = _read(file, at, 8)
        if at >= size or head.startswith(TAGS):
            return True
        if padding and not any(head):
            rest = _read(file, at, size - at)
            return rest.count(0) == len(rest)
        if len(head) < 8 or not all(32 <= byte < 127 for byte in head[:4]):
            return False
        at += 8 + int(struct.unpack(order + "I", head[4:])[0])
        if at > size:
            return False
        at += at % 2
    return False


def _mended(file: BinaryIO, unpadded: list[int], at: int, length: int, order: str, is_long: bool) -> bytes:
    """Return the file with odd chunks padded and with the number of bytes of samples that are there."""
    file.seek(0)
    data = file.read()
    if is_long:
        place = data.index(b"ds64", 12) + 16
        data = data[:place] + struct.pack(order + "Q", length) + data[place + 8 :]
    else:
        data = data[: at - 4] + struct.pack(order + "I", length) + data[at:]
    for place in reversed(unpadded):
        data = data[:place] + b"\0" + data[place:]
    return data


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)
