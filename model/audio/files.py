"""Audio files as waveforms: one function, `load_audio`, and the care with which it trusts a file.

A file may come from anywhere, so nothing it says about itself is believed. Its size is checked before it is opened. It
is decoded in blocks, each block is mixed down and resampled before the next one is read, and decoding stops at the
length limit: memory follows the length of the result, never a number in a header. A file that is damaged, cut short or
out of bounds is refused in one line and never padded or shortened. A whole one whose header or end mark its recorder
could not write is read with a warning.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from palkernels.errors import one_line
from palkernels.model.audio.containers import inspect_file
from palkernels.model.audio.dependencies import import_audio_package
from palkernels.model.audio.inspection import Inspection
from palkernels.model.audio.limits import (
    MAX_BYTES,
    MAX_CHANNELS,
    MAX_RATE,
    MIN_RATE,
    AudioError,
    check_amplitude,
    check_rates,
)
from palkernels.model.audio.resampling import resample_blocks

__all__ = ["ClipLength", "clip_length", "load_audio"]

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")  # libsndfile's names
BLOCK_FRAMES = 2**16  # Frames decoded at a time: 16 MiB for 64 channels.
MP3_FRAME = 1_152  # samples of an MPEG frame; encoders differ on whether the frame of the Xing header counts
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's frame count for a FLAC file whose header leaves the length open


class ClipLength(NamedTuple):
    """How long a clip is: samples of one channel, as often a second as ``rate`` says."""

    frames: int
    rate: int

    @property
    def seconds(self) -> float:
        return self.frames / self.rate

    def samples(self, sampling_rate: int) -> int:
        """Return how many samples :func:`load_audio` makes of it."""
        return -(-self.frames * sampling_rate // self.rate)


def clip_length(path: str | os.PathLike[str] | bytes, *, max_bytes: int = MAX_BYTES) -> ClipLength:
    """Return how long an audio file says it is, without decoding it.

    A foreign format is refused as :func:`load_audio` does, and a missing end of WAV and OGG. What else is damaged, and
    the end of FLAC and MP3, shows when it is decoded; an MP3 may then differ by a frame.

    Raises:
        AudioError: The file cannot be read, is none of the formats, or states no length.
        ModuleNotFoundError: soundfile cannot be imported.
    """
    with _opened(path, max_bytes) as (file, found, name):
        _check_header(file, name, None if found.frames else file.frames, file.samplerate, math.inf)
        length = ClipLength(found.frames or file.frames, file.samplerate)
    return length


def load_audio(
    path: str | os.PathLike[str] | bytes,
    sampling_rate: int = 16_000,
    *,
    max_bytes: int = MAX_BYTES,
    max_seconds: float = 600.0,
    strict: bool = False,
) -> Tensor:
    """Read a WAV, FLAC, OGG (Vorbis, Opus) or MP3 file as one mono waveform.

    Channels are mixed down by their mean. Another sampling rate is converted with torchaudio's windowed-sinc
    resampler (six zero crossings, Hann window). Samples are otherwise as decoded: integers scaled to [-1, 1),
    floats untouched, no normalisation.

    Args:
        path: The file, or all of its bytes. Its content decides the format, not its name.
        sampling_rate: Samples per second of the result, in Hz.
        max_bytes: The largest file that is opened.
        max_seconds: The longest audio that is accepted. Decoding stops there, whatever the header says.
        strict: Refuse the files that are read with a warning.

    Warns:
        UserWarning: The file seems whole but for what a recorder writes last: a WAV or RF64 file states no length, or
            has chunks of odd length that are not padded; an MP3 has no Xing, Info or VBRI tag, or one that states less
            than its frames hold; an OGG stream's last page is not marked as its end; a FLAC header states no
            length. All that is there is read.

    Returns:
        float32 tensor (samples,) on the CPU, samples = ceil(frames * sampling_rate / the file's rate).

    Raises:
        AudioError: The path is missing, a directory, not a regular file or unreadable; the file is empty, too
            large, not audio in one of these formats, damaged, cut short, too long or without samples; it
            holds a NaN or an infinity or a sample beyond 2**31; its rate or channel count is beyond the bounds of
            `palkernels.model.audio.limits`, or its rate has too small a common divisor with `sampling_rate`.
        ValueError: `sampling_rate`, `max_bytes` or `max_seconds` is itself out of range.
        ModuleNotFoundError: soundfile or torchaudio cannot be imported.

    Damage is found where the format allows it: a checksum (FLAC, OGG), a stated length (WAV, FLAC, MP3 with a tag), a
    frame that is not all there (MP3, FLAC), an end mark and the packets up to each position (OGG). Without an end mark
    an OGG stream counts as cut short where its last page is as full as the others and ends with a packet. Several
    streams in one OGG, FLAC or MP3 file, several chunks of samples in a WAV file, and bytes behind its samples that are
    in no chunk and may be samples (4 KiB or more) are refused too. MP3 files in a row are several streams where a later
    one begins with a tag of its own; without one its frames are like those before.
    """
    import_audio_package("soundfile", "load_audio")
    import_audio_package("torchaudio", "load_audio")  # the same for every file, whether it is resampled or not
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, int):
        raise ValueError(f"sampling_rate must be an integer, got {sampling_rate!r}")
    if not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise ValueError(f"sampling_rate must be {MIN_RATE} to {MAX_RATE} Hz, got {sampling_rate}")
    if not max_bytes > 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes!r}")
    if not 0 < max_seconds < math.inf:
        raise ValueError(f"max_seconds must be positive and finite, got {max_seconds!r}")

    with _opened(path, max_bytes) as (file, found, name):
        if found.fault and strict:
            raise AudioError(f"{name} must be free of faults with strict=True, got {found.fault}")
        _check_header(file, name, None if found.frames else file.frames, sampling_rate, max_seconds)
        blocks = _mono_blocks(file, name, found.frames or file.frames, max_seconds)
        if file.samplerate != sampling_rate:
            blocks = resample_blocks(blocks, file.samplerate, sampling_rate)
        audio = _joined(blocks, name, sampling_rate)
    if found.fault:
        seconds = audio.numel() / sampling_rate
        warnings.warn(f"{name} should be free of faults, got {found.fault}: {seconds:.2f} s are read", stacklevel=2)
    return audio


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | bytes, max_bytes: int) -> Iterator[tuple[Any, Inspection, str]]:
    """Open a file within the limits: libsndfile's file, what inspection found, and what errors call it.

    Raises:
        AudioError: The file cannot be read, or is not intact as far as its bytes show; also where reading shows it.
    """
    soundfile = import_audio_package("soundfile", "load_audio")
    held = path if isinstance(path, bytes) else None
    # repr: a line break in a file name stays inside the line
    name = f"audio file {os.fspath(path)!r}" if held is None else "audio file in memory"
    size = _checked_size(path, name, max_bytes)
    try:
        # One descriptor for our checks and for libsndfile, so that both see the same file. By name, soundfile would
        # also take a ".raw" ending for an order to read headerless samples.
        with open(path, "rb") if held is None else io.BytesIO(held) as handle:
            found = inspect_file(handle, size, name)
            if held is None:
                os.lseek(handle.fileno(), 0, os.SEEK_SET)
            image = held if found.image is None else found.image
            source = handle.fileno() if image is None else io.BytesIO(image)
            with soundfile.SoundFile(source, closefd=False) as file:
                yield file, found, name
    except OSError as error:
        raise AudioError(f"{name} must be readable, got {one_line(error.strerror or error)}") from error
    except soundfile.SoundFileError as error:
        reason = one_line(getattr(error, "error_string", error))
        raise AudioError(f"{name} must hold intact WAV, FLAC, OGG or MP3 audio, got {reason!r}") from error


def _checked_size(path: str | os.PathLike[str] | bytes, name: str, max_bytes: int) -> int:
    """Return the file's size in bytes, which is within the limits."""
    size = len(path) if isinstance(path, bytes) else _size_of(path, name)
    if size == 0:
        raise AudioError(f"{name} must hold audio, got an empty file")
    if size > max_bytes:
        raise AudioError(f"{name} must have at most {max_bytes} bytes, got {size}")
    return size


def _size_of(path: str | os.PathLike[str], name: str) -> int:
    """Return the file's size in bytes without opening the file: opening a pipe would wait for a writer."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise AudioError(f"{name} must exist, got no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AudioError(f"{name} must be readable, got {one_line(getattr(error, 'strerror', error))}") from error
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(f"{name} must be a file, got a directory")
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{name} must be a regular file, got a device, pipe or socket")
    return status.st_size


def _check_header(file: Any, name: str, announced: int | None, sampling_rate: int, max_seconds: float) -> None:
    """Refuse what the header rules out, before anything is decoded. `announced` is its count of frames."""
    rate, channels = file.samplerate, file.channels
    if file.format not in FORMATS:
        way = "soundfile.write(out, *soundfile.read(file)) converts it"  # it is one of libsndfile's formats
        raise AudioError(f"{name} must be WAV, FLAC, OGG or MP3, got {file.format}: {way}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{name} must have 1 to {MAX_CHANNELS} channels, got {channels}")
    check_rates(name, rate, sampling_rate)
    if announced is None:
        return
    if announced >= UNKNOWN_FRAMES:
        raise AudioError(f"{name} must state its length, got a header that leaves it open")
    if announced <= 0:
        raise AudioError(f"{name} must hold at least one sample, got none")
    if announced > max_seconds * rate:
        seconds = announced / rate
        raise AudioError(f"{name} must be at most {max_seconds:g} s long, got {seconds:.2f} s by its header")


def _mono_blocks(file: Any, name: str, announced: int, max_seconds: float) -> Iterator[Tensor]:
    """Decode block by block: float32 tensors (frames,), the mean of the channels, at the file's own rate."""
    limit = math.floor(max_seconds * file.samplerate)
    buffer = numpy.empty((BLOCK_FRAMES, file.channels), dtype=numpy.float32)
    decoded = 0
    while True:
        # One frame above the limit is enough to know. The header's count only keeps a read from crossing the
        # announced end, where a tag may follow that the decoder would stumble over; reading goes on until
        # nothing comes.
        wanted = min(BLOCK_FRAMES, limit + 1 - decoded)
        if decoded < file.frames:
            wanted = min(wanted, file.frames - decoded)
        block = file.read(out=buffer[:wanted])
        if len(block) == 0:
            break
        decoded += len(block)
        if decoded > limit:
            raise AudioError(f"{name} must be at most {max_seconds:g} s long, got more when decoded")
        # In float64, where the sum of large samples does not overflow. A copy: the buffer is reused.
        yield torch.from_numpy(block).mean(dim=1, dtype=torch.float64).float()
    if decoded == 0:
        raise AudioError(f"{name} must hold at least one sample, got none when decoded")
    slack = MP3_FRAME if file.format == "MP3" else 0
    if decoded < announced - slack:
        raise AudioError(f"{name} must be whole, got one cut short: {decoded} of {announced} frames")


def _joined(blocks: Iterator[Tensor], name: str, sampling_rate: int) -> Tensor:
    """Return all blocks as one tensor, each checked as it comes."""
    checked: list[Tensor] = []
    samples = 0
    for block in blocks:
        check_amplitude(name, block, sampling_rate, first_sample=samples)
        checked.append(block)
        samples += block.numel()
    return torch.cat(checked)
