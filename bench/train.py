"""The command `train`: a recipe's stages, what they will cost, and how they are interrupted and resumed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import SafetensorError
from transformers.utils import logging

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.experiments.training_cost import StageCost, simulate_stage
from palkernels.bench.instruments.rates import GPUS
from palkernels.bench.machine import available_bytes
from palkernels.bench.process import INTERRUPTED, TERMINATED
from palkernels.model.training.progress import duration
from palkernels.model.training.recipe import Recipe, RecipeError, load_recipe
from palkernels.model.training.run import Plan, Stopped, train

__all__ = ["read_recipe", "run"]

CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}


def run(path: Path, overrides: Sequence[str], *, resume: bool, estimate: bool) -> None:
    """Train what a recipe says.

    Raises:
        UserError: the recipe, the model, the data or the output folder is not usable.
        typer.Exit: a signal stopped it, after a checkpoint.
    """
    recipe = read_recipe(path, overrides)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    ending = _Ending()
    try:
        train(recipe, resume=resume, say=_say, stop=ending.asked, before=_print_costs if estimate else None)
    except Stopped as stopped:
        _say(str(stopped))
        raise typer.Exit(ending.code or 0) from stopped
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise UserError(one_line(error)) from error


def read_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Return a recipe, or print everything that is wrong with it.

    Raises:
        UserError: something is.
    """
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        if len(error.faults) == 1:
            raise UserError(error.faults[0]) from error
        print(*error.faults, sep="\n", file=sys.stderr)
        raise UserError(f"the recipe must be without faults, got {len(error.faults)}, all above") from error


class _Ending:
    """Ctrl-C and SIGTERM, from the first step on: the first lets the step end and a checkpoint be written, the second
    ends at once. Before that they end the command as any other: there is nothing to lose."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.taken = False

    def asked(self) -> bool:
        """Return whether a signal has come; asked after each step."""
        if not self.taken:
            self.taken = True
            for number in CODES:
                signal.signal(number, self._take)
        return self.code is not None

    def _take(self, number: int, frame: Any) -> None:
        if self.code is not None:
            os._exit(CODES[signal.Signals(number)])
        self.code = CODES[signal.Signals(number)]
        os.write(2, b"stopping after this step; once more to stop at once\n")


def _say(line: str) -> None:
    print(line, flush=True)


def _print_costs(plans: Sequence[Plan]) -> None:
    """Print each stage's memory and time on GPUs, and where this machine has none its memory here."""
    on_cpu = not torch.cuda.is_available()
    for plan in plans:
        try:
            _say(described(plan, _simulated(plan, "triton")))
            if on_cpu:
                _say(described_on_cpu(_simulated(plan, "sdpa"), available_bytes()))
        except Exception as error:  # a prediction is no reason not to train
            _say(f"stage {plan.stage.name}: memory and time cannot be predicted: {one_line(error, with_type=True)}")
    if on_cpu:
        _say("  (simulated, of the longest samples; after two steps a line says how long a stage takes here)")


def _simulated(plan: Plan, impl: str) -> StageCost:
    batch = plan.collate(plan.longest)
    return simulate_stage(plan.stage, plan.config, batch, plan.steps, plan.dtype, plan.bf16, impl)


def described_on_cpu(cost: StageCost, available: int | None) -> str:
    """Return a line about what a stage needs of a machine without a GPU, of which so many bytes are free."""
    line = f"  on this machine's CPU: memory about {cost.memory() / 2**30:.2f} GiB besides the program's own"
    if available is None:
        return line
    verdict = ": THAT IS NOT ENOUGH" if cost.memory() > available else ""
    return f"{line}, {available / 2**30:.1f} GiB are free{verdict}"


def described(plan: Plan, cost: StageCost) -> str:
    """Return a line about a stage, and one about its cost."""
    stage = plan.stage
    parts = {name: size for name, size in cost.simulation.memory_breakdown.items() if size >= 2**20}
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    times = ", ".join(f"{gpu.name} {duration(cost.seconds(key))}" for key, gpu in GPUS.items())
    return (
        f"stage {stage.name}: {plan.steps:,} steps of {stage.batch} samples, trains {', '.join(stage.train)}: "
        f"{cost.trained:,} of {cost.parameters:,} parameters\n"
        f"  memory {cost.memory() / 2**30:.2f} GiB a GPU ({listed}); time at most: {times}"
    )
