"""Audio files as waveforms: one function, `load_audio`, and the limits within which it trusts a file.

A file may come from anywhere, so nothing it says about itself is believed. Its size is checked before it is
opened. It is decoded in blocks, each block is mixed down and resampled before the next one is read, and
decoding stops at the length limit: memory follows the length of the result, never a number in a header. A
file that is damaged, cut short or out of bounds is refused in one line and never repaired, padded or
shortened.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

__all__ = ["AudioError", "check_rates", "load_audio", "resample"]

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")  # libsndfile's names
MIN_RATE = 1_000  # Hz. Slower recordings are not sound that a model here was trained on.
MAX_RATE = 768_000  # Hz. The fastest converters on sale.
MAX_CHANNELS = 64  # Seventh-order ambisonics.
BLOCK_FRAMES = 2**16  # Frames decoded at a time: 16 MiB for 64 channels.

# A resampler's table has rate / gcd taps for each of its sampling_rate / gcd phases. Every usual pair of
# rates needs under 300,000 taps (11,025 and 16,000 Hz). A pair without common divisors, such as 44,101 and
# 16,000 Hz, needs 700 million: a header that states such a rate would otherwise take gigabytes of memory.
MAX_RESAMPLER_TAPS = 2**24

# torchaudio's default low-pass filter, spelled out because resampling in chunks must know its reach.
FILTER_ZEROS = 6
FILTER_ROLLOFF = 0.99

# A WAV size from here on is what programs write that stream and cannot go back to fill it in.
RIFF_UNKNOWN_SIZE = 0x7FFF_0000
RIFF_MAX_CHUNKS = 1_000  # Chunks looked through for the samples. Real files have a handful.
OGG_MAX_PAGE = 65_307  # bytes, by the format's definition
MP3_FRAME = 1_152  # samples of an MPEG frame; encoders differ on whether the frame of the Xing header counts
MAX_AMPLITUDE = 2.0**31  # Full scale of the widest integers, should someone store them as floats unscaled.
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's frame count for a FLAC file whose header leaves the length open


class AudioError(ValueError):
    """A file that `load_audio` refuses. The message is one line: the file, what must hold, and what came."""


def load_audio(
    path: str | os.PathLike[str],
    sampling_rate: int = 16_000,
    *,
    max_bytes: int = 100 * 10**6,
    max_seconds: float = 600.0,
) -> torch.Tensor:
    """Read a WAV, FLAC, OGG (Vorbis, Opus) or MP3 file as one mono waveform.

    Channels are mixed down by their mean. Another sampling rate is converted with torchaudio's windowed-sinc
    resampler (six zero crossings, Hann window). Samples are otherwise as decoded: integers scaled to [-1, 1),
    floats untouched, no normalisation.

    Args:
        path: The file. Its content decides the format, not its name.
        sampling_rate: Samples per second of the result, in Hz.
        max_bytes: The largest file that is opened.
        max_seconds: The longest audio that is accepted. Decoding stops there, whatever the header says.

    Returns:
        float32 tensor (samples,) on the CPU, samples = ceil(frames * sampling_rate / the file's rate).

    Raises:
        AudioError: The path is missing, a directory, not a regular file or unreadable; the file is empty, too
            large, not audio in one of these formats, damaged, cut short, too long or without samples; it
            holds a NaN or an infinity or a sample beyond 2**31; its rate or channel count is beyond the
            limits above, or its rate has too small a common divisor with `sampling_rate`.
        ValueError: `sampling_rate`, `max_bytes` or `max_seconds` is itself out of range.
        ImportError: soundfile or torchaudio cannot be imported.

    Damage is found where the format allows it: a checksum (FLAC, OGG), a stated length (WAV, FLAC, MP3 with a
    Xing, Info or VBRI header) or an end mark (OGG) that does not fit. An MP3 without such a header states no
    length: that it was cut short cannot be seen, and with a variable bit rate libsndfile may stop early, at
    the length that it estimates from the first frame. Of several OGG streams chained in one file libsndfile
    reads the first.
    """
    soundfile, transforms = _import_audio()
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, int):
        raise ValueError(f"sampling_rate must be an integer, got {sampling_rate!r}")
    if not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise ValueError(f"sampling_rate must be {MIN_RATE} to {MAX_RATE} Hz, got {sampling_rate}")
    if not max_bytes > 0:
        raise ValueError(f"max_bytes must be positive, got {max_bytes!r}")
    if not 0 < max_seconds < math.inf:
        raise ValueError(f"max_seconds must be positive and finite, got {max_seconds!r}")

    name = f"audio file {os.fspath(path)!r}"  # repr: a line break in a file name stays inside the line
    size = _checked_size(path, name, max_bytes)
    try:
        # One unbuffered descriptor for our checks and for libsndfile, so that both see the same file. By
        # name, soundfile would also take a ".raw" ending for an order to read headerless samples.
        with open(path, "rb", buffering=0) as handle:
            missing = _what_is_missing(handle, size)
            if missing:
                raise AudioError(f"{name} must be whole, got one cut short: {missing}")
            mp3_length_stated = _states_mp3_length(handle)
            handle.seek(0)
            with soundfile.SoundFile(handle.fileno(), closefd=False) as file:
                announced = file.frames if file.format != "MP3" or mp3_length_stated else None
                _check_header(file, name, announced, sampling_rate, max_seconds)
                blocks = _mono_blocks(file, name, announced, max_seconds)
                if file.samplerate != sampling_rate:
                    resampler = _resampler(transforms, file.samplerate, sampling_rate)
                    blocks = _resampled(blocks, resampler, file.samplerate, sampling_rate)
                return _joined(blocks, name, sampling_rate)
    except OSError as error:
        raise AudioError(f"{name} must be readable, got {_one_line(error.strerror or error)}") from error
    except soundfile.SoundFileError as error:
        reason = _one_line(getattr(error, "error_string", error))
        raise AudioError(f"{name} must hold intact WAV, FLAC, OGG or MP3 audio, got {reason!r}") from error


def resample(waveform: torch.Tensor, rate: int, sampling_rate: int) -> torch.Tensor:
    """A waveform (samples,) at `rate` Hz as one at `sampling_rate` Hz, float32 on the CPU, by `load_audio`'s resampler.

    Raises:
        AudioError: A rate is beyond the limits above, or the two have too small a common divisor.
        ImportError: soundfile or torchaudio cannot be imported.
    """
    check_rates("audio", rate, sampling_rate)
    if rate == sampling_rate:
        return waveform.to("cpu", torch.float32)
    _, transforms = _import_audio()
    return torch.as_tensor(_resampler(transforms, rate, sampling_rate)(waveform.to("cpu", torch.float32)))


def check_rates(name: str, rate: int, sampling_rate: int) -> None:
    """Refuse a sampling rate beyond the limits, and one whose conversion would need too large a table."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name} must have a sampling rate of {MIN_RATE} to {MAX_RATE} Hz, got {rate} Hz")
    divisor = math.gcd(rate, sampling_rate)
    if rate != sampling_rate and (rate // divisor) * (sampling_rate // divisor) > MAX_RESAMPLER_TAPS:
        raise AudioError(
            f"{name} must have a sampling rate with a larger common divisor with {sampling_rate} Hz, "
            f"got {rate} Hz (greatest common divisor {divisor})"
        )


def _resampler(transforms: Any, rate: int, sampling_rate: int) -> Any:
    return transforms.Resample(
        rate, sampling_rate, lowpass_filter_width=FILTER_ZEROS, rolloff=FILTER_ROLLOFF, dtype=torch.float32
    )


def _import_audio() -> tuple[Any, Any]:
    """soundfile and torchaudio.transforms, imported on first use: they are the extra `audio`."""
    try:
        import soundfile
        import torchaudio.transforms
    except (ImportError, OSError) as error:  # OSError: the package is there and its shared library is not
        raise ImportError(
            f"load_audio needs soundfile and torchaudio: pip install palkernels[audio] ({_one_line(error)})"
        ) from error
    return soundfile, torchaudio.transforms


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _checked_size(path: str | os.PathLike[str], name: str, max_bytes: int) -> int:
    """The file's size in bytes, asked for without opening it: opening a pipe would wait for a writer."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise AudioError(f"{name} must exist, got no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AudioError(f"{name} must be readable, got {_one_line(getattr(error, 'strerror', error))}") from error
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(f"{name} must be a file, got a directory")
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{name} must be a regular file, got a device, pipe or socket")
    if status.st_size == 0:
        raise AudioError(f"{name} must hold audio, got an empty file")
    if status.st_size > max_bytes:
        raise AudioError(f"{name} must have at most {max_bytes} bytes, got {status.st_size}")
    return status.st_size


def _what_is_missing(handle: BinaryIO, size: int) -> str | None:
    """What shows that the file was cut short, or None.

    For the two formats whose missing end libsndfile takes for the end: it trims a WAV file's length to the
    bytes that are there, and an OGG file's to its last whole page. For the others it reports a fault or
    delivers fewer frames than it announced.
    """
    magic = handle.read(12)
    if magic[:4] == b"OggS":
        # The last page must be there to its last byte, and be marked as the end of its stream.
        handle.seek(max(0, size - 2 * OGG_MAX_PAGE))
        tail = handle.read(2 * OGG_MAX_PAGE)
        at = tail.rfind(b"OggS")
        if at < 0:  # 64 KiB of something else behind the stream
            return None
        page = tail[at:]
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            return "its last page is incomplete"
        return None if page[5] & 4 else "its last page is not marked as the end of the stream"

    if magic[:4] in (b"RIFF", b"RIFX") and magic[8:] == b"WAVE":
        order = "<" if magic[:4] == b"RIFF" else ">"
        at = 12
        for _ in range(RIFF_MAX_CHUNKS):
            handle.seek(at)
            head = handle.read(8)
            if len(head) < 8:
                return None
            (length,) = struct.unpack(order + "I", head[4:])
            at += 8
            if head[:4] == b"data":
                if at + length <= size or length >= RIFF_UNKNOWN_SIZE:
                    return None
                return f"{length} bytes of samples are announced and {size - at} are there"
            at += length + length % 2
    return None


def _states_mp3_length(handle: BinaryIO) -> bool:
    """Whether an MP3's first frame holds its length (Xing, Info, VBRI). If not, libsndfile estimates it."""
    handle.seek(0)
    head = handle.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        # A tag stands before the audio. Its size has four digits of seven bits.
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    handle.seek(start)
    frame = handle.read(4096)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


def _check_header(file: Any, name: str, announced: int | None, sampling_rate: int, max_seconds: float) -> None:
    """Refuse what the header rules out, before anything is decoded. `announced` is its count of frames."""
    rate, channels = file.samplerate, file.channels
    if file.format not in FORMATS:
        raise AudioError(f"{name} must be WAV, FLAC, OGG or MP3, got {file.format}")
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


def _mono_blocks(file: Any, name: str, announced: int | None, max_seconds: float) -> Iterator[torch.Tensor]:
    """Decode block by block: float32 tensors (frames,), the mean of the channels, at the file's own rate."""
    import numpy

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
    if announced is not None and decoded < announced - slack:
        raise AudioError(f"{name} must be whole, got one cut short: {decoded} of {announced} frames")


def _resampled(blocks: Iterator[torch.Tensor], resampler: Any, rate: int, sampling_rate: int) -> Iterator[torch.Tensor]:
    """Resample a stream of blocks, to what resampling all of it at once would give.

    Every `step_in` input frames give `step_out` output samples, and each sample depends on the input up to
    `reach` frames to either side. So whole steps are emitted once their right context is there, and the left
    context of the next step is kept. Only the stream's two ends see zeros beyond the input.
    """
    divisor = math.gcd(rate, sampling_rate)
    step_in, step_out = rate // divisor, sampling_rate // divisor
    reach = math.ceil(FILTER_ZEROS * step_in / (min(step_in, step_out) * FILTER_ROLLOFF))
    context = math.ceil(reach / step_in) * step_in

    pending = torch.empty(0, dtype=torch.float32, device="cpu")
    left = 0  # frames of left context at the start of `pending`, a multiple of step_in
    for block in blocks:
        pending = torch.cat([pending, block])
        ready = (pending.numel() - left - context) // step_in * step_in
        if ready <= 0:
            continue
        done = left + ready
        output = resampler(pending[: done + context])
        yield output[left // step_in * step_out : done // step_in * step_out]
        left = min(context, done)
        pending = pending[done - left :]
    yield resampler(pending)[left // step_in * step_out :]


def _joined(blocks: Iterator[torch.Tensor], name: str, sampling_rate: int) -> torch.Tensor:
    """All blocks as one tensor, once every sample is known to be a number that can be audio."""
    parts: list[torch.Tensor] = []
    samples = 0
    for block in blocks:
        good = block.abs() <= MAX_AMPLITUDE  # false for NaN too
        if not bool(good.all()):
            first = int((~good).nonzero()[0])
            seconds = (samples + first) / sampling_rate
            sample = block[first].item()
            raise AudioError(f"{name} must hold finite samples within 2**31, got {sample:g} near {seconds:.3f} s")
        parts.append(block)
        samples += block.numel()
    return torch.cat(parts)
