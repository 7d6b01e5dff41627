"""What the bytes of an audio file show that libsndfile does not report: a missing end, a length that is not all."""

from __future__ import annotations

from typing import BinaryIO

from palkernels.model.audio.flac import inspect_flac
from palkernels.model.audio.inspection import Inspection, convert_with
from palkernels.model.audio.limits import AudioError
from palkernels.model.audio.mpeg import id3_size, inspect_mpeg
from palkernels.model.audio.ogg import inspect_ogg
from palkernels.model.audio.riff import inspect_riff, is_riff

__all__ = ["inspect_file"]

# Formats that are refused, as libsndfile does not read them or a missing end would not show: where in the file, which
# bytes, what it is, how such files are named.
FOREIGN = (
    (4, b"ftyp", "MP4 or M4A (AAC)", "m4a"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska", "webm"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA or ASF", "wma"),
    (0, b"#!AMR", "AMR", "amr"),
    (0, b"\xff\xf1", "AAC", "aac"),
    (0, b"\xff\xf9", "AAC", "aac"),
    (0, b"BW64", "BW64", "wav"),
    (0, b"riff", "W64", "w64"),  # a WAV file's are capitals
    (0, b"FORM", "AIFF", "aiff"),
    (0, b"caff", "CAF", "caf"),
    (0, b".snd", "AU", "au"),
    (0, b"NIST", "NIST", "sph"),
    (0, b"Creative Voi", "VOC", "voc"),
)


def inspect_file(file: BinaryIO, size: int, name: str) -> Inspection:
    """Return what is imperfect about a file of `size` bytes.

    Of the faults in question libsndfile says nothing: it trims a WAV file's length to the bytes that are there, takes
    an OGG file's last whole page for the end, guesses an MP3's length, and reads the first of several streams.

    Raises:
        AudioError: The file is cut short, holds several streams, or is of a format that has to be converted.
    """
    magic = file.read(12)
    for at, mark, format, ending in FOREIGN:
        if magic[at:].startswith(mark):
            raise AudioError(f"{name} must be WAV, FLAC, OGG or MP3, got {format}: {convert_with(ending)}")
    if magic[:4] == b"OggS":
        return inspect_ogg(file, size, name)
    if is_riff(magic):
        return inspect_riff(file, size, name)
    start = id3_size(magic)
    file.seek(start)
    if file.read(4) == b"fLaC":
        return inspect_flac(file, start, name)
    return inspect_mpeg(file, start, name) or Inspection()
