"""How long and how loud a clip is does not tell the answer, of synthesised sounds and of real speech."""

import numpy as np
import pytest
from support.generated import nearest_centroid

from palkernels.bench.study.sounds.drawing import question
from palkernels.bench.study.sounds.espeak import Speaker
from palkernels.bench.study.sounds.registry import TASKS
from palkernels.bench.study.sounds.signals import RATE, active_rms

COUNT = 60  # questions of each split


def trivial(item):
    """Seconds and level of every clip."""
    levels = [20 * np.log10(np.sqrt(np.mean(clip**2))) for clip in item.clips]
    return [len(clip) / RATE for clip in item.clips], levels


def rows(task, split, speaker):
    drawn = [question(task, split, place, 1, speaker).item for place in range(COUNT)]
    return [(*trivial(item), item.answer) for item in drawn]


def bound(task):
    """Chance and three times what chance varies by."""
    chance = 1 / len(task.choices)
    return chance + 3 * np.sqrt(chance * (1 - chance) / COUNT)


def check(task, speaker):
    train, test = rows(task, "train", speaker), rows(task, "test", speaker)
    for which in (0, 1):
        accuracy = nearest_centroid(*([(row[which], row[2]) for row in split] for split in (train, test)))
        assert accuracy < bound(task), ("duration", "level")[which]
    seconds = [length for row in (*train, *test) for length in row[0]]
    assert min(seconds) >= 0.5
    assert max(seconds) <= 4


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.speaks])
def test_synthesised_clips(name):
    check(TASKS[name], None)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.speaks and task.choices])
def test_spoken_clips(name):
    pytest.importorskip("espeakng_loader", reason="needs espeakng-loader: pip install 'palkernels[demo]'")
    with Speaker() as speaker:
        check(TASKS[name], speaker)


def test_the_check_finds_a_leak():
    task = TASKS["loudness"]
    train, test = (
        [question(task, split, place, 1, None).item for place in range(COUNT)] for split in ("train", "test")
    )
    leaks = [
        [([active_rms(clip) for clip in item.clips], item.facts["louder"]) for item in split] for split in (train, test)
    ]
    assert nearest_centroid(*leaks) > bound(task)
