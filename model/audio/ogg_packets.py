"""How long the packets of an OGG stream are: Vorbis and Opus."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

__all__ = ["SamplesOf", "durations"]

SILK, HYBRID, CELT = (480, 960, 1920, 2880), (480, 960), (120, 240, 480, 960)  # samples at 48 kHz of a frame of Opus
MODE_BITS = 41  # of one mode in Vorbis' setup header: a flag, two fields of 16 zeros, 8 bits of a mapping


SamplesOf: TypeAlias = Callable[[Sequence[bytes]], list[int]]  # of each packet but the first


def durations(headers: Sequence[bytes]) -> SamplesOf | None:
    """Return what gives the samples of each packet but the first one of several, or None for another codec.

    Args:
        headers: The first three packets of the stream.
    """
    if headers and headers[0].startswith(b"OpusHead"):
        return lambda packets: [_opus_samples(packet) for packet in packets[1:]]
    if len(headers) == 3 and headers[0].startswith(b"\x01vorbis") and len(headers[0]) > 28:
        sizes = 1 << (headers[0][28] & 15), 1 << (headers[0][28] >> 4)
        blocks = [sizes[flag] for flag in _long_modes(headers[2])]
        mask = (1 << (len(blocks) - 1).bit_length()) - 1

        def vorbis_samples(packets: Sequence[bytes]) -> list[int]:
            lengths = [blocks[min(packet[0] >> 1 & mask, len(blocks) - 1)] for packet in packets if packet]
            # Each block overlaps with the one before.
            return [(before + after) // 4 for before, after in itertools.pairwise(lengths)]

        return vorbis_samples if blocks else None
    return None


def _opus_samples(packet: bytes) -> int:
    """Return an Opus packet's samples at 48 kHz, by its first two bytes."""
    if not packet:
        return 0
    config, code = packet[0] >> 3, packet[0] & 3
    frame = SILK[config & 3] if config < 12 else HYBRID[config & 1] if config < 16 else CELT[config & 3]
    count = 1 if code == 0 else 2 if code < 3 else packet[1] & 63 if len(packet) > 1 else 0
    return frame * count


def _long_modes(setup: bytes) -> list[int]:
    """Return for each mode of a Vorbis setup header whether its blocks are long.

    The modes are the last thing in the header, before a set bit and padding, and behind their number. Everything
    before them would have to be decoded to come to them, so they are read from the end.
    """
    bits = int.from_bytes(setup, "little")
    end = bits.bit_length() - 1  # the set bit
    found: list[int] = []
    modes: list[int] = []
    for _ in range(64):
        end -= MODE_BITS
        if end < 6 or bits >> (end + 1) & 0xFFFF_FFFF:
            break
        modes.insert(0, bits >> end & 1)
        if bits >> (end - 6) & 63 == len(modes) - 1:
            found = list(modes)
    return found
