"""What one study is: methods, tasks, seeds, and how long each run learns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palkernels.bench.errors import UserError
from palkernels.bench.study.contestants import CONTESTANTS
from palkernels.bench.study.sounds.registry import TASKS

__all__ = ["STUDIED_TASKS", "Settings", "Where", "parse"]

# What a connector of Whisper tiny begins to know after some hundred samples: bench/LOG.md.
STUDIED_TASKS = ("words", "languages", "voices", "timbre", "order")


@dataclass(frozen=True)
class Settings:
    """What decides a study's figures.

    Attributes:
        methods: Names of `CONTESTANTS`.
        tasks: Names of the sounds' tasks; every run learns all of them at once.
        seeds: Of connectors and of the order of samples; the sounds are the same for all.
        train, test: Questions of each task, to learn from and to be asked.
        align: Samples of the first stage, in which the connector learns alone.
        joint: Samples of the second stage, in which the language model learns as well; 0: there is none.
        batch: Samples of a step.
        every: After how many samples a run is asked the test questions.
        connector_lr, joint_lr, llm_lr: Learning rates: of the connector in either stage, and of the language model.
        window_seconds: Of the encoder.
    """

    methods: tuple[str, ...] = tuple(CONTESTANTS)
    tasks: tuple[str, ...] = STUDIED_TASKS
    seeds: tuple[int, ...] = (0, 1, 2)
    train: int = 240
    test: int = 40
    align: int = 720
    joint: int = 480
    batch: int = 2  # larger ones take more samples to the same accuracy: bench/LOG.md
    every: int = 240
    connector_lr: float = 7e-4
    joint_lr: float = 3e-4
    llm_lr: float = 1e-4
    window_seconds: float = 4.0

    def check(self) -> None:
        """Raise a UserError if no study can be made of the settings."""
        for name, known in (("methods", CONTESTANTS), ("tasks", TASKS)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or not set(values) <= set(known):
                raise UserError(
                    f"--{name} must be distinct names out of {', '.join(known)}, got {', '.join(values) or 'none'}"
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds must be distinct, got {', '.join(map(str, self.seeds)) or 'none'}")
        for name in ("align", "joint", "every"):
            if getattr(self, name) % self.batch:
                raise UserError(f"--{name} must be a multiple of the batch, {self.batch}, got {getattr(self, name)}")
        if not self.align:
            raise UserError("--align must be at least one batch, got 0")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(self).items()}


def parse(methods: str | None, tasks: str | None, seeds: str, sizes: dict[str, int | None]) -> Settings:
    """Return the settings that the command's options give; None: the default.

    Raises:
        UserError: They are not usable.
    """
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    for name, text in (("methods", methods), ("tasks", tasks)):
        if text is not None and text != "all":
            given[name] = tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        given["seeds"] = tuple(int(part) for part in seeds.split(","))
    except ValueError as error:
        raise UserError(f"--seeds must be numbers, separated by commas, got {seeds!r}") from error
    settings = Settings(**given)
    settings.check()
    return settings


@dataclass(frozen=True)
class Where:
    """Where a study's parts and files are.

    Attributes:
        out: The study's folder.
        llm: The language model's file.
        encoder: The encoder's folder.
    """

    out: Path
    llm: Path
    encoder: Path
