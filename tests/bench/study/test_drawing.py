"""What is drawn: answers are true and balanced, and the split, the wording and the voices give none away."""

import re
from collections import Counter

import numpy as np
import pytest
from support.generated import Hum, combination, voices

from palkernels.bench.study.sounds import events, tones
from palkernels.bench.study.sounds.drawing import question
from palkernels.bench.study.sounds.registry import TASKS
from palkernels.bench.study.sounds.signals import RATE, active_rms, wav
from palkernels.bench.study.sounds.speech import LANGUAGES, VOICES

EVERY = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@pytest.fixture(scope="module")
def drawn():
    """Sixty questions of each split of each task; what is spoken is a hum."""
    return {
        (name, split): [question(task, split, place, 0, Hum()) for place in range(60)]
        for name, task in TASKS.items()
        for split in ("train", "test")
    }


def undisturbed(monkeypatch, name, places):
    """Questions whose clips have no noise and no room."""
    for module in (events, tones):
        monkeypatch.setattr(module, "finished", lambda rng, signal, ratios, room=0.0: signal)
    return [question(TASKS[name], "test", place, 0, None) for place in range(places)]


def bursts(clip):
    """How often a silence ends in a clip."""
    loud = np.convolve(np.abs(clip), np.ones(80) / 80, "same") > 0.01
    return int(np.sum(loud[1:] & ~loud[:-1]))


def pitch(signal):
    """The strongest frequency of a stretch."""
    spectrum = np.abs(np.fft.rfft(signal * np.hanning(len(signal)), 1 << 16))
    return np.argmax(spectrum) * RATE / (1 << 16)


@EVERY
def test_each_answer_is_among_the_choices_and_as_frequent_as_any_other(task, drawn):
    for split in ("train", "test"):
        answers = Counter(asked.item.answer for asked in drawn[task.name, split])
        if task.choices:
            assert set(answers) == set(task.choices)
            share = 60 / len(task.choices)
            assert all(0.8 * share <= count <= 1.2 * share for count in answers.values()), answers
        else:
            assert max(answers.values()) <= 4


@EVERY
def test_a_question_has_a_mark_for_each_clip_and_does_not_tell_its_answer(task, drawn):
    asked = [*drawn[task.name, "train"], *drawn[task.name, "test"]]
    for one in asked:
        assert one.text.startswith("<audio>" * task.clips)
        assert one.text.count("<audio>") == len(one.item.clips) == task.clips
        named = {choice for choice in task.choices if re.search(rf"\b{choice}\b", one.text)}
        assert named in (set(), set(task.choices)), one.text  # all or none
        assert task.choices or one.item.answer not in one.text
    texts = {text for texts in task.questions.values() for text in texts}
    assert {one.text for one in asked} == texts
    assert len(texts) >= 4
    # Each wording is met with many answers: the best guess from the text alone is hardly better than from nothing.
    right = sum(max(Counter(one.item.answer for one in asked if one.text == text).values()) for text in texts)
    assert right / len(asked) < 0.2 + (1 / len(task.choices) if task.choices else 0.1)


@EVERY
def test_no_voice_of_the_test_is_heard_in_training(task, drawn):
    heard, unheard = (
        set().union(*(voices(asked.item.facts) for asked in drawn[task.name, split])) for split in ("train", "test")
    )
    assert not heard & unheard
    assert bool(heard) == bool(unheard) == task.speaks
    every = [voice for group in VOICES.values() for voice in group]
    assert len(every) == len(set(every))


@EVERY
def test_training_never_has_the_combinations_that_are_called_new(task, drawn):
    train, test = drawn[task.name, "train"], drawn[task.name, "test"]
    assert not any(asked.new for asked in train)
    if not task.combinations:
        assert not any(asked.new for asked in test)
        return
    assert sum(asked.new for asked in test) == 30
    parts = {
        new: {combination(task, asked.item.answer, asked.item.facts) for asked in test if asked.new == new}
        for new in (False, True)
    }
    heard = {combination(task, asked.item.answer, asked.item.facts) for asked in train}
    assert not heard & parts[True]
    assert not parts[False] & parts[True]
    assert heard & parts[False]


@EVERY
def test_no_clip_is_there_twice(task, drawn):
    clips = [wav(clip) for split in ("train", "test") for asked in drawn[task.name, split] for clip in asked.item.clips]
    assert len(set(clips)) == len(clips) == 120 * task.clips


def test_what_is_spoken_is_what_is_asked_for():
    for name in ("words", "phrases", "numbers", "languages"):
        for place in range(20):
            hum = Hum()
            item = question(TASKS[name], "train", place, 0, hum).item
            [(text, voice)] = set(hum.said)
            assert text == (item.facts["number"] if name == "languages" else item.answer)
            if name == "languages":
                assert voice.partition("+")[0] == LANGUAGES[item.answer]
    for place in range(40):
        hum = Hum()
        item = question(TASKS["voices"], "test", place, 0, hum).item
        assert hum.said[0][1].partition("+")[2] in VOICES[item.answer, "test"]
        hum = Hum()
        item = question(TASKS["speakers"], "test", place, 0, hum).item
        assert (hum.said[0][1] == hum.said[-1][1]) == (item.answer == "yes")
        assert hum.said[0][1].partition("+")[0] == hum.said[-1][1].partition("+")[0]


def test_beeps_are_as_many_as_the_answer_says(monkeypatch):
    for asked in undisturbed(monkeypatch, "count", 60):
        assert bursts(asked.item.clips[0]) == int(asked.item.answer)


def test_the_pitch_goes_where_the_answer_says(monkeypatch):
    for asked in undisturbed(monkeypatch, "direction", 60):
        sounding = np.flatnonzero(np.abs(asked.item.clips[0]) > 0.01)
        signal = asked.item.clips[0][sounding[0] : sounding[-1]]
        fifth = len(signal) // 5
        semitones = 12 * np.log2(pitch(signal[-fifth:]) / pitch(signal[:fifth]))
        goes = "flat" if abs(semitones) < 0.3 else "rising" if semitones > 0 else "falling"
        assert goes == asked.item.answer, asked.item.facts


def test_the_asked_side_is_the_louder_or_the_quieter_one():
    for place in range(60):
        item = question(TASKS["loudness"], "train", place, 0, None).item
        first, second = map(active_rms, item.clips)
        assert item.answer == ("first" if (first > second) == (item.asked == "louder") else "second")


def test_the_asked_place_in_an_order_is_the_answers():
    for place in range(60):
        item = question(TASKS["order"], "train", place, 0, None).item
        assert item.answer == item.facts[item.asked]
        assert item.facts["first"] != item.facts["second"]
    with pytest.raises(ValueError, match=r"name must be one of bell, .*, got 'gong'"):
        events.event(np.random.default_rng(0), "gong", 1.0)
