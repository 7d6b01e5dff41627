"""The parts of a clip: sounds as arrays, noise, rooms, levels, and WAV files. Arrays are float64, at 16 kHz."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = [
    "RATE", "SHAPES", "Signal", "active_rms", "at_level", "coloured_noise", "faded", "glide", "in_room",
    "noise_about", "placed", "times", "tone", "wav", "with_noise",
]  # fmt: skip

Signal = npt.NDArray[np.float64]

RATE = 16_000  # Hz
NYQUIST = RATE / 2


def times(seconds: float) -> Signal:
    """Return the sample times of a stretch, in seconds."""
    return np.arange(round(seconds * RATE)) / RATE


def faded(signal: Signal, seconds: float = 0.01) -> Signal:
    """Return a signal whose ends fade, so that it begins and ends without a click."""
    ramp = np.minimum(1.0, (np.arange(len(signal)) + 0.5) / (seconds * RATE))
    result: Signal = signal * ramp * ramp[::-1]
    return result


def _harmonics(phase: Signal, pitch: Signal, weights: dict[int, float]) -> Signal:
    """Return a sum of harmonics, of which none passes half the sampling rate."""
    total = np.zeros_like(phase)
    for harmonic, weight in weights.items():
        total += np.where(harmonic * pitch < 0.95 * NYQUIST, weight, 0.0) * np.sin(harmonic * phase)
    return total


def _overtones(weight: Callable[[int], float], step: int = 1) -> dict[int, float]:
    return {harmonic: weight(harmonic) for harmonic in range(1, 40, step)}


# The steady waveforms: the weight of each harmonic.
SHAPES: dict[str, dict[int, float]] = {
    "sine": {1: 1.0},
    "triangle": _overtones(lambda h: (-1) ** (h // 2) / h**2, 2),
    "square": _overtones(lambda h: 1 / h, 2),
    "sawtooth": _overtones(lambda h: 1 / h),
    "organ": {1: 1.0, 2: 0.9, 3: 0.5, 4: 0.7, 6: 0.4, 8: 0.6},
}


def glide(pitch: Signal, shape: str = "sine") -> Signal:
    """Return a waveform of `SHAPES` whose pitch moves: (samples,) in Hz."""
    return _harmonics(2 * np.pi * np.cumsum(pitch) / RATE, pitch, SHAPES[shape])


def tone(seconds: float, pitch: float, shape: str = "sine") -> Signal:
    """Return a steady tone that begins and ends softly."""
    return faded(glide(np.full(round(seconds * RATE), pitch), shape))


def coloured_noise(rng: np.random.Generator, samples: int, slope: float) -> Signal:
    """Return noise of power 1 whose power falls with frequency**slope: 0 white, 1 pink, 2 brown."""
    noise = _filtered_noise(rng, samples, lambda frequency: np.maximum(frequency, 40.0) ** (-slope / 2))
    result: Signal = noise / np.sqrt(np.mean(noise**2))
    return result


def noise_about(rng: np.random.Generator, samples: int, pitch: float) -> Signal:
    """Return noise of an octave or so about a pitch in Hz."""
    return _filtered_noise(
        rng, samples, lambda frequency: np.exp(-((np.log2(np.maximum(frequency, 20.0) / pitch) / 0.7) ** 2))
    )


def _filtered_noise(rng: np.random.Generator, samples: int, gain: Callable[[Signal], Signal]) -> Signal:
    size = _transform_size(samples)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    return np.fft.irfft(spectrum * gain(np.arange(len(spectrum)) / size * RATE), size)[:samples]


def _transform_size(samples: int) -> int:
    """Return a length of at least `samples` that Fourier transforms are fast at."""
    return 1 << (samples - 1).bit_length()


def placed(signal: Signal, samples: int, start: int) -> Signal:
    """Return a silence of `samples` in which a signal begins at `start`.

    Raises:
        ValueError: It does not fit.
    """
    if start < 0 or start + len(signal) > samples:
        raise ValueError(f"a signal must fit into {samples} samples, got samples {start} to {start + len(signal)}")
    clip = np.zeros(samples)
    clip[start : start + len(signal)] = signal
    return clip


def in_room(rng: np.random.Generator, signal: Signal, seconds: float) -> Signal:
    """Return a signal of the same length as in a room whose sound falls by 60 dB in `seconds`."""
    t = times(seconds)
    response = 0.3 * rng.standard_normal(len(t)) * 10 ** (-3 * t / seconds) / np.sqrt(seconds * RATE / 14)
    response[0] = 1.0
    size = _transform_size(len(signal) + len(response) - 1)
    result: Signal = np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(response, size), size)[: len(signal)]
    return result


def active_rms(signal: Signal) -> float:
    """Return the root mean square of a signal where it is sounding: in the frames of 10 ms within 30 dB of the
    loudest."""
    frames = signal[: len(signal) // 160 * 160].reshape(-1, 160)
    power = np.mean(frames**2, axis=1)
    return float(np.sqrt(np.mean(power[power > 1e-3 * power.max()])))


def with_noise(rng: np.random.Generator, signal: Signal, ratio: float) -> Signal:
    """Return a signal amid noise of a random colour; `ratio` in dB is that of the sounding signal to the noise."""
    noise = coloured_noise(rng, len(signal), rng.uniform(0.0, 2.0))
    result: Signal = signal + noise * active_rms(signal) * 10 ** (-ratio / 20)
    return result


def at_level(signal: Signal, level: float) -> Signal:
    """Return a signal whose root mean square is `level` dB of full scale."""
    result: Signal = signal * (10 ** (level / 20) / np.sqrt(np.mean(signal**2)))
    return result


def wav(signal: Signal) -> bytes:
    """Return a signal as a WAV file: mono, 16 kHz, 16 bit. What passes full scale is cut."""
    samples = np.rint(np.clip(signal, -1.0, 1.0) * 32767).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return content.getvalue()
