"""OGG: whether all pages of one stream are there, up to its end."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from palkernels.model.audio.inspection import Inspection, convert_with, cut_short
from palkernels.model.audio.limits import AudioError
from palkernels.model.audio.ogg_packets import SamplesOf, durations

__all__ = ["inspect_ogg"]

CONTINUED, FIRST, LAST = 1, 2, 4  # flags of a page
NO_POSITION = 2**64 - 1  # of a page on which no packet ends
STEADY = 0.9  # If the full pages differ by no more in a measure, it shows which page is not full:
FULL = 0.97  # one with less than this of the least full one.
MOST_TRIMMED = 4  # of the longest packets, that the first or the last page may leave out: a margin that was chosen
STEP = 2**20  # bytes read at a time
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Page:
    """One page: where it begins, its flags, the position in the stream that it states, and how much it holds."""

    at: int
    flags: int
    position: int
    serial: int
    number: int
    size: int
    lacing: bytes  # the lengths of its packets' parts: a packet ends where one is below 255
    magic: bytes  # how its content begins

    @property
    def packets(self) -> int:
        """The number of packets that end on it."""
        return sum(length < 255 for length in self.lacing)


def inspect_ogg(file: BinaryIO, size: int, name: str) -> Inspection:
    """Return what is imperfect about an OGG file of `size` bytes.

    libsndfile reads up to the last whole page, and of several streams the first.

    Raises:
        AudioError: The last page is incomplete or not the end, there are several streams, or pages hold more samples
            than their positions say.
    """
    pages = _pages(file, size, name)
    streams = [page for page in pages if page.flags & FIRST and not page.magic.startswith(b"fishead")]
    if len(streams) > 1:
        way = convert_with("ogg")
        raise AudioError(f"{name} must hold one stream, got {len(streams)} OGG streams in one file: {way}")
    strangers = {page.serial for page in pages} - {page.serial for page in pages if page.flags & FIRST}
    if streams and strangers:
        way = convert_with("ogg")
        raise AudioError(f"{name} must hold one stream, got OGG pages of another one without its beginning: {way}")
    serial = streams[0].serial if streams else pages[0].serial
    pages = [page for page in pages if page.serial == serial]
    ends = [index for index, page in enumerate(pages) if page.flags & LAST]
    if ends and ends[0] < len(pages) - 1:
        raise AudioError(f"{name} must be one OGG stream, got {len(pages) - 1 - ends[0]} pages behind its end")
    if any(page.packets and page.position == NO_POSITION for page in pages):
        raise AudioError(f"{name} must state the position of every page, got an OGG page without one")
    stated = [page for page in pages if page.position != NO_POSITION]
    for before, after in itertools.pairwise(stated):  # libsndfile goes by the last one
        if after.position < before.position:
            raise AudioError(
                f"{name} must state positions that do not decrease, got an OGG page at sample {after.position} behind "
                f"one at {before.position}"
            )
    for before, after in itertools.pairwise(pages):
        if after.number != (before.number + 1) % 2**32:
            raise AudioError(
                f"{name} must be whole, got an OGG stream whose page {after.number} follows {before.number}"
            )
    headers = list(itertools.islice(_packets(file, pages), 3))
    samples_of = durations(headers)
    if samples_of is not None:
        _check_positions(file, pages, samples_of, headers[0].startswith(b"\x01vorbis"), name)
    if ends:
        return Inspection()
    last = pages[-1]
    open_end = last.lacing.endswith(b"\xff")
    sounding = [page for page in pages if page.position not in (0, NO_POSITION)]
    if open_end or not (_is_short(sounding) or _ends_within_a_packet(file, pages, samples_of)):
        raise cut_short(name, "its last page is not marked as the end of the stream")
    return Inspection("an OGG stream whose last page is not marked as its end", _with_end_mark(file, last))


def _pages(file: BinaryIO, size: int, name: str) -> list[Page]:
    """Return all pages, checked to be whole. What stands between or behind them is passed over, as libogg does."""
    pages: list[Page] = []
    at = 0
    while True:
        file.seek(at)
        head = file.read(27)
        if head[:4] != b"OggS":
            at = _find(file, at)
            if at < 0:
                return pages
            continue
        lacing = file.read(head[26]) if len(head) == 27 else b""
        body = sum(lacing)
        length = 27 + len(lacing) + body
        if len(head) < 27 or len(lacing) < head[26] or at + length > size:
            raise cut_short(name, "its last page is incomplete")
        flags, position, serial, number, crc = struct.unpack("<BQIII", head[5:26])
        content = file.read(body)
        if checksum(head[:22] + bytes(4) + head[26:] + lacing + content) != crc:
            raise AudioError(
                f"{name} must hold intact WAV, FLAC, OGG or MP3 audio, got an OGG page changed at byte {at}"
            )
        pages.append(Page(at, flags, position, serial, number, length, lacing, content[:8]))
        at += length


def _find(file: BinaryIO, at: int) -> int:
    """Return where the next page begins, or -1."""
    while True:
        file.seek(at)
        block = file.read(STEP)
        index = block.find(b"OggS")
        if index >= 0:
            return at + index
        if len(block) < 4:
            return -1
        at += len(block) - 3


def _is_short(pages: list[Page]) -> bool:
    """Return whether the last of the pages with sound may be the end of its stream.

    A muxer closes pages at a number of bytes, of packets or of samples, which all its pages therefore share; only the
    last one may hold less. A stream that was cut between two pages ends with a full one. Where this cannot be told,
    by too few pages or too different ones, the last page counts as the end.
    """
    if len(pages) < 2:
        return True
    positions = [0, *(page.position for page in pages)]
    samples = [after - before for before, after in itertools.pairwise(positions)]
    measures = [[sum(page.lacing) for page in pages], [page.packets for page in pages], samples]
    if max(measures[1]) == 1:
        return True
    steady = False
    for *before, last in measures:
        full = before[1:] if len(before) > 2 else before  # the first page may have been closed early
        if min(full) >= STEADY * max(full):
            steady = True
            if last < FULL * min(full):
                return True
    return not steady


def _ends_within_a_packet(file: BinaryIO, pages: list[Page], samples_of: SamplesOf | None) -> bool:
    """Return whether the last page states fewer samples than its packets hold: so an encoder ends a stream."""
    before, last = pages[-2:]
    packets = list(_packets(file, [before, last]))[-last.packets - 1 :]
    if samples_of is None or len(packets) <= last.packets:
        return False
    return last.position - before.position < sum(samples_of(packets))


def _check_positions(file: BinaryIO, pages: list[Page], samples_of: SamplesOf, is_vorbis: bool, name: str) -> None:
    """Check that pages hold as many samples as their positions say: libsndfile reads up to the last one.

    Any page's position may lie behind a gap. The last page may end within its last packets, and Vorbis' first one may
    begin within its first.

    Raises:
        AudioError: A page holds more samples than it says.
    """
    headers, before, position = 3 if is_vorbis else 2, [] if is_vorbis else [b""], 0
    last = [page for page in pages if page.packets][-1]
    for page, packets in zip(pages, _packets_by_page(file, pages), strict=True):
        sound, headers = packets[headers:], max(headers - len(packets), 0)
        if not sound:
            continue
        lengths = samples_of([*before, *sound])
        held, stated = sum(lengths), page.position - position
        may_be_trimmed = page is last or (is_vorbis and position == 0)
        left_out = MOST_TRIMMED * max(lengths, default=0) if may_be_trimmed else 0
        if held - stated > left_out:
            raise AudioError(
                f"{name} must state positions that fit its packets, got an OGG page of {held} samples at the positions "
                f"{position} to {page.position}: {convert_with('ogg')}"
            )
        before, position = sound[-1:], page.position


def _packets(file: BinaryIO, pages: list[Page]) -> Iterator[bytes]:
    """Read the packets that begin and end on some pages of a stream."""
    return itertools.chain.from_iterable(_packets_by_page(file, pages))


def _packets_by_page(file: BinaryIO, pages: list[Page]) -> Iterator[list[bytes]]:
    """Read, for each of some pages of a stream, the packets that end there and began on one of them."""
    packet, whole = b"", not pages[0].flags & CONTINUED
    for page in pages:
        packets: list[bytes] = []
        file.seek(page.at + 27 + len(page.lacing))
        for length in page.lacing:
            packet += file.read(length)
            if length < 255:
                if whole:
                    packets.append(packet)
                packet, whole = b"", True
        yield packets


def _with_end_mark(file: BinaryIO, page: Page) -> bytes:
    """Return the file with its last page marked as the end, as libopus asks where it ends within a packet."""
    file.seek(0)
    data = bytearray(file.read(page.at + page.size))
    data[page.at + 5] |= LAST
    data[page.at + 22 : page.at + 26] = bytes(4)
    data[page.at + 22 : page.at + 26] = struct.pack("<I", checksum(bytes(data[page.at :])))
    return bytes(data)


def checksum(page: bytes) -> int:
    """Return the CRC-32 of OGG: the polynomial of zlib's, with the bits of bytes and of the result in reverse."""
    value = zlib.crc32(page.translate(REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int.from_bytes(value.to_bytes(4, "little").translate(REVERSED), "big")
