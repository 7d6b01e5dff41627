"""The spoken tasks: words, phrases, numbers, the sex of a voice, whether two voices are one, and languages."""

from __future__ import annotations

import numpy as np
import torch

from palkernels.bench.study.sounds.signals import RATE, Signal, placed
from palkernels.bench.study.sounds.tasks import Draw, Item, Task, finished, pick
from palkernels.model.audio.resampling import resample

__all__ = ["ACCENTS", "LANGUAGES", "SPEECH_TASKS", "VOICES", "WORDS"]

# espeak-ng's variants, of which those of the test split are unheard in training.
VOICES = {
    ("man", "train"): ("m1", "m2", "m3", "m4", "m7", "Andy", "Denis", "Hugo", "Marco", "sandro"),
    ("man", "test"): ("m6", "m8", "antonio", "travis", "victor"),
    ("woman", "train"): ("f1", "f2", "f4", "Alicia", "Andrea", "Annie", "grandma", "linda", "steph"),
    ("woman", "test"): ("f3", "f5", "anika", "aunty"),
}
SEXES = ("man", "woman")
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan")
LANGUAGES = {"English": "en", "French": "fr", "German": "de", "Italian": "it", "Polish": "pl", "Spanish": "es"}
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "pink",
)  # fmt: skip
ADJECTIVES = ("red", "green", "blue", "yellow", "small", "big", "old", "new", "warm", "cold", "clean", "heavy")
NOUNS = (
    "apple", "bird", "boat", "book", "bottle", "box", "bridge", "chair", "clock", "cloud",
    "coat", "door", "fish", "flower", "garden", "hat", "house", "river", "table", "train",
)  # fmt: skip


def voice_of(draw: Draw, sex: str = "") -> str:
    """Return a variant of the draw's split, of either sex or of one."""
    return pick(draw.rng, VOICES[sex or pick(draw.rng, SEXES), "test" if draw.test else "train"])


def said(
    draw: Draw, text: str, voice: str, seconds: float, *, rates: tuple[int, int], pitches: tuple[int, int] = (35, 65)
) -> Signal:
    """Return a clip of `seconds` in which a text is said at some moment. Where it would not fit it is said faster."""
    assert draw.speech is not None
    rng, samples = draw.rng, round(seconds * RATE)
    rate, pitch, span = int(rng.integers(*rates)), int(rng.integers(*pitches)), int(rng.integers(30, 71))
    speech = _spoken(draw, text, voice, rate, pitch, span)
    while len(speech) > samples:
        rate = int(rate * 1.05 * len(speech) / samples) + 1
        speech = _spoken(draw, text, voice, rate, pitch, span)
    return placed(speech, samples, int(rng.integers(samples - len(speech) + 1)))


def _spoken(draw: Draw, text: str, voice: str, rate: int, pitch: int, span: int) -> Signal:
    assert draw.speech is not None
    samples = draw.speech.speak(text, voice, rate=rate, pitch=pitch, range=span)
    sounding = np.flatnonzero(np.abs(samples) > 0.003)  # without the pauses that espeak-ng makes before and after
    samples = samples[sounding[0] : sounding[-1] + 1]
    return resample(torch.from_numpy(samples).float(), draw.speech.rate, RATE).double().numpy()


def _accent(draw: Draw, kept: tuple[int, ...]) -> str:
    """Return one of the accents that are kept for the test split's new combinations, or one of the others."""
    return pick(draw.rng, [accent for index, accent in enumerate(ACCENTS) if (index in kept) == draw.new])


def words(draw: Draw) -> Item:
    """One word of twenty. An accent of each word is kept."""
    accent = _accent(draw, (WORDS.index(draw.answer) % len(ACCENTS),))
    voice = f"{accent}+{voice_of(draw)}"
    clip = said(draw, draw.answer, voice, draw.rng.uniform(1.0, 1.5), rates=(110, 211))
    return Item((finished(draw.rng, clip, (10.0, 30.0), room=0.3),), draw.answer, {"voice": voice})


def phrases(draw: Draw) -> Item:
    """An adjective and a noun. A fifth of the pairs is kept."""
    pairs = [
        f"{adjective} {noun}"
        for i, adjective in enumerate(ADJECTIVES)
        for j, noun in enumerate(NOUNS)
        if ((i + j) % 5 == 0) == draw.new
    ]
    answer = pick(draw.rng, pairs)
    voice = f"{pick(draw.rng, ACCENTS)}+{voice_of(draw)}"
    clip = said(draw, answer, voice, draw.rng.uniform(1.5, 2.0), rates=(110, 211))
    return Item((finished(draw.rng, clip, (0.0, 20.0), room=0.4),), answer, {"voice": voice})


def numbers(draw: Draw) -> Item:
    """A number of two digits or of three. Those whose digits add up to a multiple of five are kept."""
    digits = int(draw.rng.integers(2, 4))
    among = [n for n in range(10 ** (digits - 1), 10**digits) if (sum(map(int, str(n))) % 5 == 0) == draw.new]
    answer = str(pick(draw.rng, among))
    voice = f"{pick(draw.rng, ACCENTS)}+{voice_of(draw)}"
    clip = said(draw, answer, voice, draw.rng.uniform(1.8, 2.5), rates=(130, 211))
    return Item((finished(draw.rng, clip, (0.0, 20.0), room=0.4),), answer, {"voice": voice, "digits": digits})


def voices(draw: Draw) -> Item:
    """Whether a man speaks or a woman, who are nearer in pitch than they would be. Each has two accents kept."""
    accent = _accent(draw, {"man": (0, 3), "woman": (1, 4)}[draw.answer])
    voice, word = f"{accent}+{voice_of(draw, draw.answer)}", pick(draw.rng, WORDS)
    pitches = {"man": (45, 86), "woman": (15, 56)}[draw.answer]
    clip = said(draw, word, voice, draw.rng.uniform(1.0, 1.5), rates=(110, 211), pitches=pitches)
    return Item((finished(draw.rng, clip, (0.0, 20.0), room=0.4),), draw.answer, {"voice": voice, "word": word})


def speakers(draw: Draw) -> Item:
    """Whether one voice says a word twice. Two voices share the accent, and half of the time the sex."""
    accent, sex, other = pick(draw.rng, ACCENTS), pick(draw.rng, SEXES), pick(draw.rng, SEXES)
    first = second = voice_of(draw, sex)
    while draw.answer == "no" and second == first:
        second = voice_of(draw, other)
    word = pick(draw.rng, WORDS)
    clips = tuple(
        finished(
            draw.rng,
            said(draw, word, f"{accent}+{voice}", draw.rng.uniform(1.0, 1.5), rates=(130, 191), pitches=(45, 56)),
            (15.0, 35.0),
        )
        for voice in (first, second)
    )
    facts = {"voice": f"{accent}+{first}", "second": f"{accent}+{second}", "word": word}
    return Item(clips, draw.answer, facts)


def languages(draw: Draw) -> Item:
    """A number of three digits in one of several languages. A fourth of the numbers of each language is kept."""
    shift = list(LANGUAGES).index(draw.answer)
    among = [n for n in range(100, 1000) if ((sum(map(int, str(n))) + shift) % 4 == 0) == draw.new]
    number, voice = str(pick(draw.rng, among)), f"{LANGUAGES[draw.answer]}+{voice_of(draw)}"
    clip = said(draw, number, voice, draw.rng.uniform(1.8, 2.5), rates=(140, 231))
    return Item((finished(draw.rng, clip, (0.0, 20.0), room=0.4),), draw.answer, {"voice": voice, "number": number})


SPEECH_TASKS = (
    Task(
        "words",
        words,
        {
            "": (
                "<audio>Which word is spoken?",
                "<audio>What word do you hear?",
                "<audio>Write the word that is said.",
                "<audio>Which word does the speaker say?",
            )
        },
        choices=WORDS,
        speaks=True,
    ),
    Task(
        "phrases",
        phrases,
        {
            "": (
                "<audio>Write the two words that are spoken.",
                "<audio>What does the speaker say?",
                "<audio>Which two words do you hear?",
                "<audio>Transcribe the speech.",
            )
        },
        speaks=True,
    ),
    Task(
        "numbers",
        numbers,
        {
            "": (
                "<audio>Which number is spoken? Answer in digits.",
                "<audio>Write the spoken number in digits.",
                "<audio>What number do you hear? Use digits.",
                "<audio>Give the number that is said, in digits.",
            )
        },
        speaks=True,
    ),
    Task(
        "voices",
        voices,
        {
            "": (
                "<audio>Is the speaker a man or a woman?",
                "<audio>Who speaks, a woman or a man?",
                "<audio>Does a man or a woman say the word?",
                "<audio>Whose voice is it, a woman's or a man's? Answer woman or man.",
            )
        },
        choices=SEXES,
        speaks=True,
    ),
    Task(
        "speakers",
        speakers,
        {
            "": (
                "<audio><audio>Do both clips have the same speaker? Answer yes or no.",
                "<audio><audio>Is it the same voice in both clips, yes or no?",
                "<audio><audio>Does one person say both? Answer no or yes.",
                "<audio><audio>Are the two said by the same voice, no or yes?",
            )
        },
        choices=("yes", "no"),
        clips=2,
        combinations=False,
        speaks=True,
    ),
    Task(
        "languages",
        languages,
        {
            "": (
                "<audio>Which language is spoken?",
                "<audio>In which language is the number said?",
                "<audio>What language does the speaker use?",
                "<audio>Name the language that you hear.",
            )
        },
        choices=tuple(LANGUAGES),
        speaks=True,
    ),
)
