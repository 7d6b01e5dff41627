"""How far a stage is, and how long it will take: a bar on a terminal, elsewhere a line now and then, the first after
two steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

__all__ = ["Progress", "duration"]

SECONDS = 30.0  # between two lines


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss and the time that is left, of the first process."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.bar: tqdm[Any] | None = None
        self.first_step: tuple[int, float] | None = None  # of this process, and when it ended
        self.last_line: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = sys.stderr.isatty() and state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name) if shown else None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            return
        now, left = time.monotonic(), self._left(state)
        if left is not None and (self.last_line is None or now - self.last_line > SECONDS):
            self.last_line = now
            step = f"step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}"
            self.say(f"stage {self.name}: {step}, about {duration(left)} left")

    def _left(self, state: Any) -> float | None:
        """Return the seconds that are left, if steps go on to take what they took; the first is left out, as it takes
        longer. None: it cannot be told yet."""
        if self.first_step is None or state.global_step == self.first_step[0]:
            return None
        step, ended = self.first_step
        seconds: float = (time.monotonic() - ended) / (state.global_step - step)
        steps: int = state.max_steps - state.global_step
        return seconds * steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.first_step is None:
            self.first_step = state.global_step, time.monotonic()
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Return a time in words: seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
