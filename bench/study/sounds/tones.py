"""The tasks of tones: where a pitch goes, how many beeps there are, and what kind of sound it is."""

from __future__ import annotations

from itertools import product

import numpy as np

from palkernels.bench.study.sounds.palette import instrument
from palkernels.bench.study.sounds.signals import RATE, faded, glide, placed, tone
from palkernels.bench.study.sounds.tasks import Draw, Item, Task, finished, pick

__all__ = ["TONE_TASKS"]

DIRECTIONS = ("rising", "falling", "flat")
COUNTS = ("1", "2", "3", "4", "5")
TIMBRES = ("bell", "noise", "organ", "pluck", "sawtooth", "sine", "square", "triangle")
REGISTERS = ((130.0, 230.0), (230.0, 410.0), (410.0, 730.0), (730.0, 1300.0))  # Hz
INTERVALS = ((1.0, 2.5), (2.5, 5.0), (5.0, 12.0))  # semitones
TEMPI = ((0.17, 0.23), (0.23, 0.32), (0.32, 0.44))  # seconds from beep to beep
GLIDING = ("sine", "triangle", "square", "sawtooth")


def direction(draw: Draw) -> Item:
    """A tone whose pitch rises, falls or stays. Combinations of register and interval are kept."""
    rng = draw.rng
    cells = [(r, i) for r, i in product(range(4), range(3)) if ((r + i) % 4 == 0) == draw.new]
    register, interval = pick(rng, cells)
    shape, seconds = pick(rng, GLIDING), rng.uniform(0.5, 1.2)
    semitones = rng.uniform(*INTERVALS[interval]) * {"rising": 1, "falling": -1, "flat": 0}[draw.answer]
    course = np.linspace(-0.5, 0.5, round(seconds * RATE))
    signal = faded(glide(rng.uniform(*REGISTERS[register]) * 2 ** (semitones * course / 12), shape), 0.05)
    samples = round(rng.uniform(1.4, 1.8) * RATE)
    clip = placed(signal, samples, int(rng.integers(samples - len(signal) + 1)))
    facts: dict[str, str | float] = {
        "register": register,
        "interval": interval,
        "semitones": round(semitones, 3),
        "shape": shape,
    }
    return Item((finished(rng, clip, (0.0, 20.0)),), draw.answer, facts)


def count(draw: Draw) -> Item:
    """One to five beeps at uneven distances. Combinations of tempo and register are kept."""
    rng = draw.rng
    cells = [(t, r) for t, r in product(range(3), range(4)) if ((t + r) % 4 == 0) == draw.new]
    tempo, register = pick(rng, cells)
    pitch, shape = rng.uniform(*REGISTERS[register]), pick(rng, GLIDING)
    starts = np.cumsum([rng.uniform(*TEMPI[tempo]) * rng.uniform(0.8, 1.2) for _ in range(int(draw.answer))])
    starts = np.round((starts - starts[0]) * RATE).astype(int)
    # Half of the time beeps sound equally long together, however many: neither their length nor its sum is the count.
    length = rng.uniform(0.05, 0.11)
    if rng.random() < 0.5:
        length = min(rng.uniform(0.2, 0.4) / len(starts), 0.6 * TEMPI[tempo][0])
    beeps = [tone(length, pitch * rng.uniform(0.97, 1.03), shape) * rng.uniform(0.7, 1.0) for _ in starts]
    samples = round(rng.uniform(2.4, 2.8) * RATE)
    offset = int(rng.integers(samples - starts[-1] - len(beeps[-1]) + 1))
    clip = np.sum([placed(beep, samples, offset + start) for beep, start in zip(beeps, starts, strict=True)], axis=0)
    facts: dict[str, str | int] = {"tempo": tempo, "register": register, "shape": shape}
    return Item((finished(rng, clip, (0.0, 20.0)),), draw.answer, facts)


def timbre(draw: Draw) -> Item:
    """One sound of eight kinds. One register of each kind is kept."""
    rng, shift = draw.rng, TIMBRES.index(draw.answer)
    register = pick(rng, [r for r in range(4) if ((r + shift) % 4 == 0) == draw.new])
    signal = instrument(rng, draw.answer, rng.uniform(0.5, 1.0), rng.uniform(*REGISTERS[register]))
    samples = round(rng.uniform(1.2, 1.6) * RATE)
    clip = placed(signal, samples, int(rng.integers(samples - len(signal) + 1)))
    return Item((finished(rng, clip, (0.0, 20.0), room=0.3),), draw.answer, {"register": register})


TONE_TASKS = (
    Task(
        "direction",
        direction,
        {
            "": (
                "<audio>Is the pitch rising, falling or flat?",
                "<audio>How does the pitch move: falling, flat or rising?",
                "<audio>Where does the tone go? Answer flat, rising or falling.",
                "<audio>Say whether the tone is rising, flat or falling.",
            )
        },
        choices=DIRECTIONS,
    ),
    Task(
        "count",
        count,
        {
            "": (
                "<audio>How many beeps are there? Answer with a digit.",
                "<audio>Count the beeps and answer with a digit.",
                "<audio>How often does it beep? Give a digit.",
                "<audio>What is the number of beeps, as a digit?",
            )
        },
        choices=COUNTS,
    ),
    Task(
        "timbre",
        timbre,
        {
            "": (
                "<audio>Which kind of sound is it?",
                "<audio>What makes this sound?",
                "<audio>Name the kind of sound.",
                "<audio>What sound do you hear?",
            )
        },
        choices=TIMBRES,
    ),
)
