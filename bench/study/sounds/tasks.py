"""What a task is: what is asked, what can be answered, and how a clip for an answer is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from palkernels.bench.study.sounds.signals import Signal, at_level, in_room, with_noise

__all__ = ["Draw", "Item", "Speech", "Task", "finished", "pick"]

T = TypeVar("T")
LEVELS = (-34.0, -24.0)  # dB of full scale, of a whole clip


class Speech(Protocol):
    """What speaks: `espeak.Speaker`, with its pitch, range and rate of samples."""

    rate: int

    def speak(self, text: str, voice: str, *, rate: int, pitch: int, range: int) -> npt.NDArray[np.float64]:
        """Return the samples of an utterance."""


@dataclass(frozen=True)
class Draw:
    """What one item is to be.

    Attributes:
        rng: All of its chance.
        test: Whether it is of the test split, whose voices training never hears.
        new: Whether it is to be of the combinations that training never hears.
        answer: One of the task's choices; "" if the task has none.
        speech: What speaks, where the task needs it.
    """

    rng: np.random.Generator
    test: bool
    new: bool
    answer: str
    speech: Speech | None = None


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        clips: What is heard, (samples,) each.
        answer: What is right.
        facts: What it was made of, for a closer look at results.
        asked: Which of the task's kinds of question it is.
    """

    clips: tuple[Signal, ...]
    answer: str
    facts: Mapping[str, str | int | float]
    asked: str = ""


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: What files and tables call it.
        make: Makes an item.
        questions: The wordings of each kind of question; one without kinds has them under "".
        choices: What the answer is one of; () where it is open.
        clips: How many each item has.
        combinations: Whether some combinations are kept for the test split.
        speaks: Whether espeak-ng is needed.
    """

    name: str
    make: Callable[[Draw], Item]
    questions: Mapping[str, tuple[str, ...]] = field(repr=False)
    choices: tuple[str, ...] = ()
    clips: int = 1
    combinations: bool = True
    speaks: bool = False


def pick(rng: np.random.Generator, among: Sequence[T]) -> T:
    """Return one of several, each as likely."""
    return among[int(rng.integers(len(among)))]


def finished(rng: np.random.Generator, signal: Signal, ratios: tuple[float, float], room: float = 0.0) -> Signal:
    """Return a clip amid noise, perhaps in a room, at a level that says nothing of what is heard.

    Args:
        ratios: Least and largest ratio of signal to noise, in dB.
        room: The longest reverberation in seconds; 0: none.
    """
    if room and rng.random() < 0.5:
        signal = in_room(rng, signal, rng.uniform(0.1, room))
    return at_level(with_noise(rng, signal, rng.uniform(*ratios)), rng.uniform(*LEVELS))
