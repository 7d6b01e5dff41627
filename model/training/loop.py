"""One stage, by transformers' Trainer: its loop, accelerate's devices, DDP and FSDP2. What is ours is which samples a
step is of, the rates of the parts, checkpoints that are whole, and the log."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from palkernels.model.pal import PalForConditionalGeneration
from palkernels.model.pal.parts import by_entry
from palkernels.model.pal.windows import output_lengths, windows_of
from palkernels.model.training.accuracy import Scores, score
from palkernels.model.training.checkpoints import PREFIX, checkpoints_in, finish, read_json, unfinished, write_json
from palkernels.model.training.order import Collate, Given, Order, Pieces
from palkernels.model.training.recipe import StageRecipe
from palkernels.model.training.stages import parameter_groups
from palkernels.model.training.trained import gather, put_back

__all__ = ["Log", "StageTrainer", "audio_tokens", "schedule"]

WEIGHTS, PROGRESS = "trained.safetensors", "progress.json"


class Log:
    """The log of a run: a JSON object a line. One process writes it, what a resumed run repeats is cut off first."""

    def __init__(self, path: Path, stage: str, writes: bool) -> None:
        self.path, self.stage, self.writes = path, stage, writes

    def cut(self, step: int) -> None:
        """Drop the stage's lines behind a step, and a last line that is not whole."""
        if not self.writes or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["stage"] != self.stage or entry["step"] <= step:
                kept.append(line + "\n")
        written = self.path.with_name("." + self.path.name)
        written.write_text("".join(kept), encoding="utf-8")
        written.replace(self.path)

    def add(self, **values: Any) -> None:
        """Add a line."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, **values}) + "\n")


class _AtStepEnd(TrainerCallback):  # type: ignore[misc]
    """Stops where someone asks for it, and evaluates."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer.asked_to_stop():
            control.should_save = control.should_training_stop = True
            control.should_log = True  # a line of the log is of the steps up to a checkpoint
            trainer.stopped = True
        every = trainer.eval_steps
        if every is not None and state.global_step % every == 0 and state.global_step < state.max_steps:
            trainer.evaluate_now()


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trains what a stage says.

    Args:
        model: The model, whose parts have been chosen.
        arguments: Whose ``output_dir`` is the folder of checkpoints.
        stage: The stage.
        chosen: As :func:`~palkernels.model.training.stages.choose` returned it.
        order: The samples of each step.
        collate: Makes their batches.
        log: Of the run.
        keep: How many checkpoints are kept.
        held_out: Samples to evaluate on; none: it is not evaluated.
        eval_steps: After how many steps it is evaluated.
        stop: Asked after each step whether to stop.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PalForConditionalGeneration,
        arguments: TrainingArguments,
        *,
        stage: StageRecipe,
        chosen: dict[str, list[str]],
        order: Order,
        collate: Collate,
        log: Log,
        keep: int,
        held_out: Sequence[Any] = (),
        eval_steps: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.stage, self.chosen, self.order, self.collate, self.lines = stage, chosen, order, collate, log
        self.keep, self.held_out, self.stop = keep, held_out, stop
        self.eval_steps = eval_steps if held_out else None
        self.stopped = False
        self.heard = torch.zeros((), dtype=torch.int64)  # audio tokens of this process since the last line
        self.progress: dict[str, float] = {"audio_tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0}
        self.since, self.cpu_since = time.monotonic(), time.process_time()
        super().__init__(model, arguments, data_collator=collate, train_dataset=Given())
        self.remove_callback(PrinterCallback)
        self.add_callback(_AtStepEnd(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.loader(Pieces(self.order, self.stage.gradient_accumulation, *self.place()))

    def loader(self, pieces: Pieces) -> DataLoader[Any]:
        """Return a loader of batches, whose order is decided already: it takes no random numbers of the process."""
        return DataLoader(
            Given(),
            batch_sampler=pieces,
            collate_fn=self.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def place(self) -> tuple[int, int]:
        """Return this process's number, and how many there are."""
        return self.args.process_index, self.args.world_size

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.chosen, self.stage)
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon)
        made: torch.optim.Optimizer = self.optimizer
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            factor = schedule(self.stage, num_training_steps)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.heard = self.heard + audio_tokens(self.accelerator.unwrap_model(model), inputs)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def num_examples(self, dataloader: Any) -> int:
        return self.order.samples

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add a line to the log besides what Trainer's own reports say."""
        if "loss" in logs:
            self._tick()
            first = next(iter(self.chosen))  # whose rate Trainer reports; one schedule is that of all
            rates = {part: logs["learning_rate"] * rate / self.stage.lr[first] for part, rate in self.stage.lr.items()}
            self.lines.add(
                step=self.state.global_step,
                samples=self.order.samples_after(self.state.global_step),
                loss=logs["loss"],
                lr=rates,
                grad_norm=logs.get("grad_norm"),
                **self._taken(),
            )
        super().log(logs, start_time)

    def _taken(self) -> dict[str, float]:
        """Return what a line says of the cost so far: seconds, those of the first process's CPUs, audio tokens."""
        seconds = {name: round(self.progress[name], 3) for name in ("seconds", "cpu_seconds")}
        return {**seconds, "audio_tokens": int(self.progress["audio_tokens"])}

    def _tick(self) -> None:
        """Bring ``progress`` up to now; all processes do it together."""
        heard = self.heard.to(self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(heard)
        now = time.monotonic()
        self.progress["audio_tokens"] += int(heard)
        cpu = time.process_time()
        self.progress["seconds"] += now - self.since
        self.progress["cpu_seconds"] += cpu - self.cpu_since
        self.cpu_since = cpu
        self.since, self.heard = now, torch.zeros((), dtype=torch.int64)

    def asked_to_stop(self) -> bool:
        """Return whether someone asked any of the processes to stop; several agree where a line is logged."""
        asked = self.stop is not None and self.stop()
        if self.args.world_size == 1:
            return asked
        if self.state.global_step % self.args.logging_steps:
            return False
        flag = torch.tensor(int(asked), device=self.args.device)
        torch.distributed.all_reduce(flag)
        return bool(flag)

    def evaluate_now(self) -> Scores:
        """Return loss and accuracy on the samples that are held out, and log them."""
        batch = self.stage.batch
        steps = [list(self.held_out[i : i + batch]) for i in range(0, len(self.held_out), batch)]
        pieces = Pieces(steps, self.stage.gradient_accumulation, *self.place())
        self._tick()
        began, cpu_began = time.monotonic(), time.process_time()
        scores = score(self, self.model_wrapped, pieces)
        # Seconds of the log are those of training.
        self.since += time.monotonic() - began
        self.cpu_since += time.process_time() - cpu_began
        step = self.state.global_step
        self.lines.add(step=step, samples=self.order.samples_after(step), **scores.as_dict(), **self._taken())
        return scores

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that is there whole or not at all, and remove those that are old."""
        self._tick()
        folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        written = unfinished(folder)
        first = self.args.process_index == 0
        if first:
            shutil.rmtree(written, ignore_errors=True)
            written.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        tensors = gather(self.model, keep=first)
        if first:
            save_file({name: x.contiguous() for name, x in tensors.items()}, written / WEIGHTS)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            write_json(written / PROGRESS, self.progress)
        self._save_optimizer_and_scheduler(str(written))
        self._save_scaler(str(written))
        self._save_rng_state(str(written))
        self.accelerator.wait_for_everyone()
        if first:
            finish(folder)
            for old in checkpoints_in(folder.parent)[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        put_back(self.model if model is None else model, load_file(folder / WEIGHTS))
        self.progress = read_json(folder / PROGRESS)
        self.lines.cut(int(folder.name.removeprefix(PREFIX)))


def schedule(stage: StageRecipe, steps: int) -> Callable[[int], float]:
    """Return the share of its learning rate that each step of a stage has, from 0 on.

    It rises to 1 in the steps of the warm-up, whose first has a share of it already; then it stays, or falls along a
    line or half a cosine to 0 after the last step.
    """
    warmup = round(stage.warmup if stage.warmup >= 1 else stage.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}[stage.schedule]

    return factor


def audio_tokens(model: Any, batch: dict[str, Any]) -> int:
    """Return how many tokens the connectors make of a batch's clips."""
    lengths = batch.get("audio_lengths")
    if lengths is None:
        return 0
    windows = windows_of(model.config.encoders, [tower.features for tower in model.audio_tower])
    entries = by_entry(model.config.encoders, list(zip(lengths.unbind(1), windows, strict=True)))
    pairs = zip(model.multi_modal_projector, entries, strict=True)
    return sum(int(output_lengths(connector, *of_towers[0]).sum()) for connector, (_, of_towers) in pairs)
