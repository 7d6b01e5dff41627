"""How far a stage is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

__all__ = ["Progress"]

SECONDS = 30.0  # between two lines


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss and the time that is left, of the first process."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.bar: tqdm[Any] | None = None
        self.last_line = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = sys.stderr.isatty() and state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name) if shown else None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        elif time.monotonic() - self.last_line > SECONDS:
            self.last_line = time.monotonic()
            self.say(f"stage {self.name}: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
