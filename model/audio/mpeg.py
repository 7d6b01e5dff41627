"""MP3: how many samples its frames hold, whatever a tag says about them or does not say."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from palkernels.model.audio.inspection import Inspection, convert_with, cut_short
from palkernels.model.audio.limits import AudioError

__all__ = ["id3_size", "inspect_mpeg"]

# The headers of MPEG audio: 11 bits of synchronisation, then a version, a layer, a bit rate and a sampling rate, none
# of them a reserved one. A bit rate of 0 is free: such a frame does not say how long it is.
HEADER = re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][\x00-\xef].", re.DOTALL)
RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG 1; a half in MPEG 2, a quarter in MPEG 2.5
KBITS = {  # by (whether it is MPEG 1, the layer)
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
ROOMY_BIT_RATE = 9  # index of a bit rate whose frames hold a tag, in any version of layer III
SEARCHED = 2**16  # bytes in which the first frame must begin, behind tags
EXACT = (b"LAME", b"Lavf", b"Lavc")  # encoders whose tags are known to state the frames behind the tag's own
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")


@dataclass(frozen=True)
class Frame:
    """What a frame's header says. `kind` is what all frames of a stream share."""

    kind: tuple[int, int, bool]  # Hz, the layer, whether mono
    samples: int
    size: int  # bytes; 0: not said
    tag_at: int  # where a tag would stand in it

    @property
    def silent(self) -> bool:
        """Whether the header does not say how long the frame is."""
        return self.size == 0


@dataclass
class Walk:
    """What the frames of a file are, one after another."""

    start: int  # of the first frame
    first: Frame
    tag_frames: int | None  # frames that the tag in the first one states; 0: it leaves them open; None: there is no tag
    exact: bool = False  # whether the tag is of an encoder that is known to count the frames behind the tag's own
    frames: int = 0  # whole ones, without the tag's
    incomplete: bool = False  # whether the last one is cut
    damage: int | None = None  # where bytes between frames begin that are neither a frame nor a tag
    kinds: int = 1  # of streams met
    streams: int = 1  # that begin with a tag of their own, the first one in any case


def id3_size(head: bytes) -> int:
    """Return the length of the ID3v2 tag that begins with these 10 bytes, 0 if none does."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    # Its size has four digits of seven bits.
    return 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))


def inspect_mpeg(file: BinaryIO, start: int, name: str) -> Inspection | None:
    """Return what is imperfect about an MP3 file whose tags end at `start`, or None where no frame begins there.

    libsndfile reads as many samples as a tag in the first frame (Xing, Info, VBRI) states. Without one it guesses by
    the first frame's bit rate and stops there, wherever the file ends.

    Raises:
        AudioError: The file is cut short, damaged, of several sampling rates or several files in a row, or its frames
            do not tell its length.
    """
    file.seek(start)
    if HEADER.search(file.read(SEARCHED)) is None:
        return None
    file.seek(0)
    data = file.read()
    walk = _walk(data, start)
    if walk is None:
        return None
    if walk.first.silent and not walk.tag_frames:
        way = convert_with("mp3")
        raise AudioError(f"{name} must state its bit rate, got an MP3 of free format without a length: {way}")
    if walk.kinds > 1:
        way = convert_with("mp3")
        raise AudioError(f"{name} must be one stream, got MP3 frames of several rates or channel counts: {way}")
    if walk.streams > 1:
        way = convert_with("mp3")
        raise AudioError(f"{name} must hold one stream, got {walk.streams} MP3 streams in one file: {way}")
    stated = walk.tag_frames
    # Encoders differ on whether the tag's frame counts.
    sure = walk.exact or walk.incomplete or walk.damage is not None
    if stated and walk.frames < (stated if sure else stated - 1):
        part = " and a part of one" if walk.incomplete else ""
        damage = "" if walk.damage is None else f", and none at byte {walk.damage}"
        raise cut_short(name, f"{walk.frames} of {stated} frames{part}{damage}")
    if walk.frames == 0 or (stated and walk.frames <= stated + 1):
        return Inspection()  # what is missing shows when it is decoded
    if walk.incomplete:
        raise cut_short(name, "its last frame is incomplete")
    if walk.damage is not None:
        raise AudioError(f"{name} must hold intact WAV, FLAC, OGG or MP3 audio, got no frame at byte {walk.damage}")
    if stated:
        fault = f"an MP3 whose tag states {stated} frames, of {walk.frames} that are there"
    else:
        fault = "an MP3 without a tag that states its length"
    samples = walk.frames * walk.first.samples
    if walk.first.kind[1] != 3:  # a tag exists for layer III alone
        return Inspection(fault, frames=samples)
    return Inspection(fault, _length_tag(data[walk.start : walk.start + 4], walk) + data[walk.start :], samples)


def _frame(head: bytes) -> Frame | None:
    """Return what the four bytes of a header say, or None if they are none."""
    if len(head) < 4 or not HEADER.fullmatch(head):
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)  # versions: 3 is MPEG 1, 2 is MPEG 2, 0 is MPEG 2.5
    rate_index, padding = head[2] >> 2 & 3, head[2] >> 1 & 1
    if rate_index == 3:
        return None
    is_first, mono = version == 3, head[3] >> 6 == 3
    rate = RATES[rate_index] >> (0 if is_first else 1 if version == 2 else 2)
    bits = KBITS[is_first, layer][head[2] >> 4] * 1000
    samples = 384 if layer == 1 else 1152 if layer == 2 or is_first else 576
    size = (bits * 12 // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    side = (17 if mono else 32) if is_first else (9 if mono else 17)
    checked = 0 if head[1] & 1 else 2
    return Frame((rate, layer, mono), samples, size if bits else 0, 4 + checked + side)


def _walk(data: bytes, start: int) -> Walk | None:
    """Step from frame to frame through a whole file; None if none begins near `start`."""
    at: int | None = start
    first = _frame(data[start : start + 4])
    if first is None or not (first.silent or _follows(data, start, first)):
        at = _next_frame(data, start, start + SEARCHED)
        if at is None:
            return None
        first = _frame(data[at : at + 4])
    assert at is not None
    assert first is not None
    tag = _tag_frames(data, at, first)
    walk = Walk(at, first, tag, exact=tag is not None and any(x in data[at : at + first.size] for x in EXACT))
    if first.silent:
        walk.frames = tag or 0  # if the length is stated, nothing has to be counted
        return walk
    if tag is not None:
        at += first.size
        walk.start = at
    kind = first.kind
    while at < len(data):
        frame = _frame(data[at : at + 4])
        if frame is None or frame.silent or not (frame.kind == kind or _follows(data, at, frame)):
            if (skipped := id3_size(data[at : at + 10])) and _next_frame(data, at + skipped, at + skipped + 1):
                at += skipped
                continue
            following = _next_frame(data, at, len(data))
            if following is None:
                return walk
            walk.damage = at if walk.damage is None else walk.damage
            at = following
            continue
        if at + frame.size > len(data):
            walk.incomplete = True
            return walk
        if frame.kind != kind:
            kind, walk.kinds = frame.kind, walk.kinds + 1
        if at > walk.start and _is_tag(data, at, frame):  # at the start it may be an older one that was kept
            walk.streams += 1
        walk.frames += 1
        at += frame.size
    return walk


def _next_frame(data: bytes, at: int, end: int) -> int | None:
    """Return where a frame begins that another one, a tag or the end follows."""
    for found in HEADER.finditer(data, at, min(len(data), end + 3)):
        frame = _frame(found[0])
        if frame is not None and _follows(data, found.start(), frame):
            return found.start()
    return None


def _follows(data: bytes, at: int, frame: Frame) -> bool:
    """Return whether a frame at `at` ends where the next one of its kind, a tag or the end of the file is."""
    if frame.silent:
        return False
    behind = data[at + frame.size : at + frame.size + 16]
    if not behind:
        return at + frame.size == len(data)
    following = _frame(behind[:4])
    return behind.startswith(TAGS) or (following is not None and following.kind == frame.kind)


def _tag_frames(data: bytes, at: int, frame: Frame) -> int | None:
    """Return how many frames a Xing, Info or VBRI tag in the first frame states: 0 if it leaves that open."""
    tag = data[at + frame.tag_at : at + frame.tag_at + 12]
    if tag[:4] in (b"Xing", b"Info") and len(tag) == 12:
        flags, frames = struct.unpack(">II", tag[4:])
        return int(frames) if flags & 1 else 0
    tag = data[at + 36 : at + 54]
    if tag[:4] == b"VBRI" and len(tag) == 18:
        return int(struct.unpack(">I", tag[14:])[0])
    return None


def _is_tag(data: bytes, at: int, frame: Frame) -> bool:
    """Return whether a frame holds a tag and nothing else: before a tag there are zeros, where sound says how to decode
    it."""
    return _tag_frames(data, at, frame) is not None and not any(data[at + 6 : at + frame.tag_at])


def _length_tag(header: bytes, walk: Walk) -> bytes:
    """Return a frame that states how many frames follow, of the kind whose header this is."""
    roomy = bytes([header[0], header[1] | 1, ROOMY_BIT_RATE << 4 | header[2] & 0x0D, header[3]])
    frame = _frame(roomy)
    assert frame is not None
    tag = b"Xing" + struct.pack(">II", 1, walk.frames)
    return (roomy + bytes(frame.tag_at - 4) + tag).ljust(frame.size, b"\0")
