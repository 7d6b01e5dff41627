"""Clips that a processor must refuse.

Run as a program, it prints by how many bytes refusing them all raises the peak of memory.
"""

import resource

import numpy
import torch

from palkernels.model import AudioError, PalProcessor
from support.audio_llm import AUDIO_TOKEN, TOKENIZER, entry, tone

# By name: the clip, its sampling rate, and what the error says of it.
HOSTILE = {
    "rank 2": (torch.zeros(2, 100), 16_000, r"audio must have shape \(samples,\), one channel, got \(2, 100\)"),
    "rank 0": (numpy.float32(1), 16_000, "audio must be a NumPy array, a tensor or a path, got float32"),
    "list": ([0.5], 16_000, "audio must be a NumPy array, a tensor or a path, got a list of numbers"),
    "int16": (numpy.zeros(100, "i2"), 16_000, "audio must be floating point, .*, got int16: samples of 16 bits"),
    "object": (numpy.array([None] * 9), 16_000, "audio must be floating point.*got object"),
    "complex": (torch.zeros(9, dtype=torch.complex64), 16_000, "audio must be floating point.*got torch.complex64"),
    "empty": (torch.zeros(0), 16_000, "audio must hold at least one sample, got none"),
    "nan": (torch.tensor([0.0, float("nan")]), 16_000, "audio must hold finite samples within"),
    "infinite": (numpy.array([1e300, 0.0]), 16_000, "audio must hold finite samples within"),
    "no rate": (torch.zeros(9), None, "sampling_rate must be given with arrays"),
    "rate": (torch.zeros(9), 16_000.5, "sampling_rate must be an integer"),
    "slow": (torch.zeros(9), 10, "audio must have a sampling rate of 1000 to 768000 Hz, got 10 Hz"),
    "odd rate": (torch.zeros(9), 44_101, "audio must have a sampling rate with a larger common divisor"),
    "long": (torch.zeros(1).expand(10**12), 16_000, "audio must be at most 781.25 s long, got 62500000.00 s"),
    "long array": (numpy.broadcast_to(numpy.float32(0), 10**12), 16_000, "audio must be at most 781.25 s long"),
    "bytes": (torch.zeros(1, dtype=torch.float64).expand(7 * 10**6), 768_000, "audio must have at most 50000000 bytes"),
}  # fmt: skip
WAV = (  # 64 channels of 16 bits at 48 kHz, as long as the format can say
    b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\x01\0\x40\0\x80\xbb\0\0\0\0\x5d\0\x80\0\x10\0data\xff\xff\xff\xff"
)


def processor():
    return PalProcessor(TOKENIZER, [entry("sslam"), entry("whisper")], max_bytes=50 * 10**6)


def files():
    """Paths that must be refused. Writes files with holes that take no room, of 10 GB, 49 MB and 45 MB."""
    for name, start, size in (
        ("huge.wav", WAV, 10**10),
        ("hole.flac", b"fLaC", 49 * 10**6),
        ("wide.wav", WAV, 45 * 10**6),
    ):
        with open(name, "wb") as file:
            file.write(start)
            file.truncate(size)
    return ["huge.wav", "hole.flac", "/dev/zero"]


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    process = processor()
    process(AUDIO_TOKEN, tone(), 16_000)
    before = peak()
    for clip, rate in [*((clip, rate) for clip, rate, _ in HOSTILE.values()), *((path, None) for path in files())]:
        try:
            process(AUDIO_TOKEN, clip, rate)
        except AudioError:
            continue
        print("accepted", repr(clip)[:60])
    process(AUDIO_TOKEN, "wide.wav")  # 64 channels of 7 s: within every limit
    print(peak() - before)


if __name__ == "__main__":
    main()
