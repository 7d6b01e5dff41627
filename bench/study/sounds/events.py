"""The tasks of events: which of two sounds came first or last, and which of two clips is louder or quieter."""

from __future__ import annotations

from itertools import product

import numpy as np

from palkernels.bench.study.sounds.palette import EVENTS, event
from palkernels.bench.study.sounds.signals import RATE, active_rms, placed
from palkernels.bench.study.sounds.tasks import Draw, Item, Task, finished, pick

__all__ = ["EVENT_TASKS"]

SIDES = ("first", "second")


def order(draw: Draw) -> Item:
    """Two sounds, one after the other; asked is which came first, or last. Of six pairs the order is kept: training
    hears each of them in the other order alone."""
    rng, asked = draw.rng, pick(draw.rng, SIDES)
    wanted, kinds = EVENTS.index(draw.answer), len(EVENTS)
    pairs = [
        (a, b)
        for a, b in product(range(kinds), repeat=2)
        if a != b and (a, b)[SIDES.index(asked)] == wanted and ((b - a) % kinds == 1) == draw.new
    ]
    first, second = pick(rng, pairs)
    sounds = [event(rng, EVENTS[kind], rng.uniform(0.35, 0.6)) for kind in (first, second)]
    sounds = [sound / active_rms(sound) * 10 ** (rng.uniform(-3, 3) / 20) for sound in sounds]
    both = np.concatenate([sounds[0], np.zeros(round(rng.uniform(0.02, 0.25) * RATE)), sounds[1]])
    samples = round(rng.uniform(1.6, 2.0) * RATE)
    clip = placed(both, samples, int(rng.integers(samples - len(both) + 1)))
    facts = {"first": EVENTS[first], "second": EVENTS[second]}
    return Item((finished(rng, clip, (0.0, 20.0), room=0.3),), draw.answer, facts, asked)


def loudness(draw: Draw) -> Item:
    """Two clips of one sound each; asked is which is louder, or quieter. A third of the pairs of sounds is kept."""
    rng, asked = draw.rng, pick(draw.rng, ("louder", "quieter"))
    kinds = range(len(EVENTS))
    pair = pick(rng, [(a, b) for a, b in product(kinds, repeat=2) if ((a + b) % 3 == 0) == draw.new])
    difference = rng.uniform(2.0, 14.0)
    first_is_louder = (draw.answer == "first") == (asked == "louder")
    middle = rng.uniform(-32.0, -22.0)  # dB of full scale
    levels = [middle + (difference if louder else -difference) / 2 for louder in (first_is_louder, not first_is_louder)]
    clips = []
    for kind, level in zip(pair, levels, strict=True):
        samples = round(rng.uniform(0.9, 1.2) * RATE)
        sound = event(rng, EVENTS[kind], rng.uniform(0.5, 0.8))
        clip = placed(sound / active_rms(sound), samples, int(rng.integers(samples - len(sound) + 1)))
        clips.append(clip * 10 ** (level / 20) + rng.standard_normal(samples) * 10 ** (-65 / 20))
    facts = {"first": EVENTS[pair[0]], "second": EVENTS[pair[1]], "louder": SIDES[not first_is_louder]}
    return Item(tuple(clips), draw.answer, facts | {"decibels": round(difference, 3)}, asked)


EVENT_TASKS = (
    Task(
        "order",
        order,
        {
            "first": (
                "<audio>Which sound comes first?",
                "<audio>What is the first sound?",
                "<audio>Name the sound at the beginning.",
                "<audio>Which of the two sounds do you hear first?",
            ),
            "second": (
                "<audio>Which sound comes last?",
                "<audio>What is the last sound?",
                "<audio>Name the sound at the end.",
                "<audio>Which of the two sounds do you hear last?",
            ),
        },
        choices=EVENTS,
    ),
    Task(
        "loudness",
        loudness,
        {
            "louder": (
                "<audio><audio>Which clip is louder, the first or the second?",
                "<audio><audio>Which of the two is louder: second or first?",
                "<audio><audio>Is the first or the second clip the loud one?",
                "<audio><audio>Where is the sound louder, in the second clip or in the first?",
            ),
            "quieter": (
                "<audio><audio>Which clip is quieter, the first or the second?",
                "<audio><audio>Which of the two is quieter: second or first?",
                "<audio><audio>Is the first or the second clip the quiet one?",
                "<audio><audio>Where is the sound quieter, in the second clip or in the first?",
            ),
        },
        choices=SIDES,
        clips=2,
    ),
)
