"""All tasks, by name."""

from __future__ import annotations

from palkernels.bench.study.sounds.events import EVENT_TASKS
from palkernels.bench.study.sounds.speech import SPEECH_TASKS
from palkernels.bench.study.sounds.tasks import Task
from palkernels.bench.study.sounds.tones import TONE_TASKS

__all__ = ["TASKS"]

TASKS: dict[str, Task] = {task.name: task for task in (*SPEECH_TASKS, *TONE_TASKS, *EVENT_TASKS)}
