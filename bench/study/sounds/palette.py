"""The sounds with names that tasks are made of."""

from __future__ import annotations

import numpy as np

from palkernels.bench.study.sounds.signals import RATE, SHAPES, Signal, coloured_noise, faded, glide, noise_about, times

__all__ = ["EVENTS", "event", "instrument"]

BELL = {0.56: 0.6, 0.92: 0.5, 1.19: 0.8, 1.7: 0.5, 2.0: 1.0, 2.74: 0.4, 3.76: 0.3}  # partials of a struck bell

EVENTS = ("bell", "buzz", "drum", "hiss", "pluck", "whistle")


def instrument(rng: np.random.Generator, name: str, seconds: float, pitch: float) -> Signal:
    """Return a note of an instrument, or of a waveform of `SHAPES`, at a pitch in Hz."""
    t = times(seconds)
    if name in SHAPES:
        wobble = 1 + 0.004 * np.sin(2 * np.pi * (rng.uniform(4, 7) * t + rng.random()))
        return faded(glide(pitch * wobble, name), rng.uniform(0.01, 0.1))
    if name == "noise":  # about the pitch that others have
        return faded(noise_about(rng, len(t), pitch), rng.uniform(0.01, 0.1))
    decay = rng.uniform(2.0, 5.0)
    if name == "bell":
        parts = [w * np.exp(-decay * r * t / 1.5) * np.sin(2 * np.pi * r * pitch * t) for r, w in BELL.items()]
    elif name == "pluck":
        highest = min(20, int(0.45 * RATE / pitch))
        parts = [
            np.exp(-decay * (0.6 + 0.4 * h) * t) * np.sin(2 * np.pi * h * pitch * t) / h**1.2
            for h in range(1, highest + 1)
        ]
    else:
        raise ValueError(f"name must be an instrument, got {name!r}")
    return faded(np.sum(parts, axis=0), 0.004)


def event(rng: np.random.Generator, name: str, seconds: float) -> Signal:
    """Return one of `EVENTS`, each time a little different."""
    t = times(seconds)
    if name == "bell":
        return instrument(rng, "bell", seconds, rng.uniform(400, 900))
    if name == "pluck":
        return instrument(rng, "pluck", seconds, rng.uniform(150, 400))
    if name == "buzz":
        return instrument(rng, "sawtooth", seconds, rng.uniform(90, 140))
    if name == "whistle":
        bend = 1 + rng.uniform(0.05, 0.12) * np.sin(2 * np.pi * rng.uniform(3, 6) * t)
        return faded(glide(rng.uniform(1200, 2200) * bend), 0.03)
    if name == "hiss":
        noise = coloured_noise(rng, len(t), -1.0)  # stronger towards high frequencies
        return faded(noise, 0.05)
    if name == "drum":  # strokes whose pitch falls
        since = np.mod(t, rng.uniform(0.13, 0.2))
        return faded(
            np.sin(2 * np.pi * rng.uniform(70, 110) * since * (1 + 0.8 * np.exp(-30 * since))) * np.exp(-18 * since),
            0.004,
        )
    raise ValueError(f"name must be one of {', '.join(EVENTS)}, got {name!r}")
