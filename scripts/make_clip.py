"""Write the clip that palkernels bundles: 12 s of synthesised sound, 16 kHz, mono, 16 bit.

    python scripts/make_clip.py [--output bench/assets/clip.flac]

Four scenes that an audio model can tell apart: a plucked melody (the opening of Beethoven's "Ode to Joy"), a
bird's calls, rain, and a voice-like sound gliding through vowels. Everything is computed from sines and
seeded noise, so the clip carries nobody's recording, and every run gives the same samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

Signal = npt.NDArray[np.float64]

RATE = 16_000  # Hz
SEED = 0
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "bench" / "assets" / "clip.flac"

# Scale degrees of the melody as semitones above middle C, one per quarter of a second.
MELODY = (4, 4, 5, 7, 7, 5, 4, 2, 0, 0, 2, 4, 4, 2)
MIDDLE_C = 261.63  # Hz
NOTE_SECONDS = 0.25

# The first three formants of four vowels, in Hz (rounded averages for an adult voice).
VOWELS = {"a": (730, 1090, 2440), "e": (530, 1840, 2480), "i": (270, 2290, 3010), "u": (300, 870, 2240)}
FORMANT_WIDTHS = (90.0, 110.0, 170.0)  # Hz


def times(seconds: float) -> Signal:
    """The sample times of a scene, in seconds."""
    return np.arange(round(seconds * RATE)) / RATE


def faded(signal: Signal, seconds: float = 0.03) -> Signal:
    """The signal with its ends faded, so that scenes join without a click."""
    ramp = np.minimum(1.0, (np.arange(len(signal)) + 0.5) / (seconds * RATE))
    result: Signal = signal * ramp * ramp[::-1]
    return result


def melody() -> Signal:
    """Plucked notes: eight harmonics, the higher ones weaker and sooner gone. 4 s, the last note ringing."""
    signal = np.zeros(round(4.0 * RATE))
    for index, semitones in enumerate(MELODY):
        start = round(index * NOTE_SECONDS * RATE)
        t = times(4.0)[: len(signal) - start]
        pitch = MIDDLE_C * 2.0 ** (semitones / 12)
        for harmonic in range(1, 9):
            decay = np.exp(-t * (3.0 + 1.5 * harmonic))
            signal[start:] += decay * np.sin(2 * np.pi * harmonic * pitch * t) / harmonic**1.5
    return signal


def bird() -> Signal:
    """Six calls between 2.5 and 6 kHz: sweeps up, trills and sweeps down. 2.5 s."""
    signal = np.zeros(round(2.5 * RATE))
    for index, (low, high, trill) in enumerate(
        (
            (2800, 5200, 0),
            (2800, 5400, 0),
            (4200, 4200, 38),
            (5800, 3000, 0),
            (3900, 3900, 30),
            (2600, 6000, 12),
        )
    ):
        t = times(0.28)
        frequency = low + (high - low) * (t / t[-1]) ** 2 + 500 * np.sin(2 * np.pi * trill * t)
        call = np.sin(2 * np.pi * np.cumsum(frequency) / RATE) * np.sin(np.pi * t / t[-1]) ** 2
        start = round((0.05 + 0.4 * index) * RATE)
        signal[start : start + len(call)] += call
    return signal


def rain(random: np.random.Generator) -> Signal:
    """A bed of noise that falls off towards both ends of the spectrum, and 90 drops on top. 2.5 s."""
    count = round(2.5 * RATE)
    spectrum = np.fft.rfft(random.uniform(-1.0, 1.0, count))
    frequency = np.fft.rfftfreq(count, 1 / RATE)
    bed = np.fft.irfft(spectrum * (frequency / 1500) / (1 + (frequency / 1500) ** 2), count)
    signal = 0.35 * bed
    for _ in range(90):
        start = int(random.integers(0, count - 400))
        t = times(0.025)
        pitch, loudness = random.uniform(1200, 4500), random.uniform(0.1, 0.6)
        signal[start : start + len(t)] += loudness * np.exp(-t * 250) * np.sin(2 * np.pi * pitch * t)
    return signal


def voice() -> Signal:
    """Harmonics of a gliding pitch, shaped by formants that move a-e-i-u-a. 3 s."""
    t = times(3.0)
    pitch = 125 + 20 * np.sin(2 * np.pi * 0.6 * t) + 2 * np.sin(2 * np.pi * 5 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    stops = np.linspace(0, t[-1], 5)
    formants = [
        np.interp(t, stops, [VOWELS[vowel][number] for vowel in "aeiua"]).astype(np.float64) for number in range(3)
    ]
    signal = np.zeros(len(t))
    for harmonic in range(1, 41):
        gain = sum(
            (0.6**number) / (1 + ((harmonic * pitch - formant) / width) ** 2)
            for number, (formant, width) in enumerate(zip(formants, FORMANT_WIDTHS, strict=True))
        )
        signal += gain * np.sin(harmonic * phase) / harmonic**0.5
    return signal * (0.75 - 0.25 * np.cos(2 * np.pi * 4 * t))  # four syllables a second


def synthesise() -> npt.NDArray[np.int16]:
    """The clip: (192000,) samples, each scene scaled to the same peak of 0.6."""
    random = np.random.default_rng(SEED)
    scenes = [faded(scene) for scene in (melody(), bird(), rain(random), voice())]
    joined = np.concatenate([0.6 * scene / np.abs(scene).max() for scene in scenes])
    samples: npt.NDArray[np.int16] = np.round(joined * 32767).astype(np.int16)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description="Write palkernels' bundled clip.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    output: Path = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(output, synthesise(), RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    print(f"{output}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
