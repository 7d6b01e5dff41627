"""A whole run of a recipe: the model it starts with, the data, and one stage after the other, to be resumed anywhere.

output/
    recipe.json       what decides the weights; a run goes on only with the same
    start/            the model that was built of parts
    dropped.jsonl     rows that give no sample, each with its reason
    log.jsonl         loss, rates, norms, seconds and audio tokens by step; scores on held-out samples
    checkpoints/      of the stage at work
    stages/1-align/   the whole model after a stage; trained.safetensors, what the stage trained; stage.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from palkernels.errors import one_line
from palkernels.model.building import build
from palkernels.model.data.collator import Collator
from palkernels.model.data.states import EncodedStates
from palkernels.model.pal import PalConfig, PalForConditionalGeneration, PalProcessor
from palkernels.model.training.arguments import training_arguments
from palkernels.model.training.checkpoints import (
    STAGE,
    TRAINED,
    WRITING,
    checkpoints_in,
    read_json,
    whole_folder,
    write_json,
)
from palkernels.model.training.loop import Log, StageTrainer
from palkernels.model.training.material import damage_explained, damaged_rows, read_material
from palkernels.model.training.order import Collate, Order
from palkernels.model.training.progress import Progress
from palkernels.model.training.recipe import Recipe, StageRecipe
from palkernels.model.training.stages import choose
from palkernels.model.training.trained import gather, load_trained, save_trained

__all__ = ["Plan", "RunError", "Stopped", "train"]

SEEDS = 1000  # a stage's seed is the recipe's, times this, and its number
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECIPE, LOG = "recipe.json", "log.jsonl"
START, DROPPED = "start", "dropped.jsonl"
BEFORE = (START, DROPPED)  # what is written before a run has begun
SAMPLES = "samples"  # in RECIPE: a digest of what there is to learn


class RunError(ValueError):
    """A run that cannot begin or go on."""


class Stopped(Exception):  # noqa: N818
    """Someone asked the run to stop; it has written a checkpoint."""


@dataclass(frozen=True)
class Plan:
    """What is known of a stage before it begins.

    Attributes:
        stage: The stage.
        config: The model's.
        steps: How many it has.
        samples: How many samples they are of.
        longest: The samples of a process's piece of a step, each as long as the longest there is.
        collate: Makes a batch of them.
        processes: How many there are.
        bf16: Whether it computes in bfloat16.
        dtype: Of frozen weights.
    """

    stage: StageRecipe
    config: PalConfig
    steps: int
    samples: int
    longest: Sequence[Any]
    collate: Callable[[Sequence[Any]], dict[str, Any]]
    processes: int
    bf16: bool
    dtype: torch.dtype


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] | None = None,
    before: Callable[[Sequence[Plan]], None] | None = None,
) -> Path:
    """Train what a recipe says, and return the folder of the model after its last stage.

    Started by ``accelerate launch`` or ``torchrun`` it is one of several processes, which train together.

    Args:
        recipe: As :func:`load_recipe` returned it.
        resume: Whether to go on with the run in ``recipe.output``, to the same weights, bit for bit, as without the
            interruption. Where there is none a new one begins, which is said.
        say: Takes lines for the user, of the first process alone.
        stop: Asked after each step; where it returns True, a checkpoint is written and the run stops.
        before: Called with all stages before the first one begins.

    Raises:
        RunError: The folder holds a run already, or one of another recipe.
        Stopped: ``stop`` returned True.
        ValueError: The model or the data cannot be used.
    """
    return _Run(recipe, say, stop, before).run(resume)


class _Run:
    def __init__(self, recipe: Recipe, say: Any, stop: Any, before: Any) -> None:
        self.recipe, self.stop, self.before = recipe, stop, before
        self.folder = Path(recipe.output)
        self.state = PartialState(cpu=not torch.cuda.is_available())
        self.say: Callable[[str], None] = say if self.state.is_main_process else lambda _: None

    def run(self, resume: bool) -> Path:
        if resume and not (self.folder / RECIPE).exists():
            self.say(f"no run to go on with in {self.folder}: a new one begins")
        self._open(resume)
        last = self._folder_of(len(self.recipe.stages) - 1)
        if last.exists():
            self.say(f"finished already: {last}")
            return last
        start = self._start()
        self.config = PalConfig.from_pretrained(start)
        self.processor = PalProcessor.from_pretrained(start)
        name = self.recipe.model.dtype or str(self.config.dtype or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise RunError(f"model must be of weights in {', '.join(DTYPES)}, got {name}: model.dtype says another one")
        self.dtype = DTYPES[name]
        self._read_material()
        orders = [self.material.order(stage, self._seed(i)) for i, stage in enumerate(self.recipe.stages)]
        if self.before is not None and self.state.is_main_process:
            self.before([self._plan(stage, order) for stage, order in zip(self.recipe.stages, orders, strict=True)])
        self._claim()
        for i, stage in enumerate(self.recipe.stages):
            after = self._folder_of(i)
            if after.exists():
                self.say(f"stage {stage.name}: done already")
            else:
                self._run_stage(i, stage, orders[i], start)
            start = after
        self.say(f"Model: {start}")
        return start

    def _open(self, resume: bool) -> None:
        """Take the output folder for this run, or for going on with it."""
        world = self.state.num_processes
        for i, stage in enumerate(self.recipe.stages):
            if stage.batch % (stage.gradient_accumulation * world):
                raise RunError(
                    f"stages.{i}.batch must be a multiple of gradient_accumulation times processes, "
                    f"{stage.gradient_accumulation} times {world}, got {stage.batch}"
                )
        file = self.folder / RECIPE
        if file.exists() and not resume:
            raise RunError(
                f"output must be a new folder, got {str(self.folder)!r}, which holds a run: --resume goes on"
            )
        left = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        if not file.exists() and any(name not in BEFORE and not name.startswith(WRITING) for name in left):
            raise RunError(f"output must be a new or empty folder, got {str(self.folder)!r} with something in it")
        if file.exists():
            before = read_json(file)
            before.pop(SAMPLES, None)
            meaning = self._meaning()
            names = [name for name in {**before, **meaning} if before.get(name) != meaning.get(name)]
            if names:
                changes = [f"{name} was {before.get(name)!r}, is {meaning.get(name)!r}" for name in names]
                raise RunError(f"a run must go on with the recipe that it began with, got: {'; '.join(changes)}")
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():  # of a start that came to nothing, perhaps with another recipe
                shutil.rmtree(self.folder / START, ignore_errors=True)
        self.state.wait_for_everyone()

    def _read_material(self) -> None:
        """Read the samples, of which a run that goes on drops the same damaged ones as when it began."""
        damaged = damaged_rows(self.folder / DROPPED) if (self.folder / RECIPE).exists() else None
        place = self.state.process_index, self.state.num_processes
        self.material = read_material(self.recipe, self.processor, self.say, damaged, place)
        if self.state.is_main_process and damaged is None:
            self.material.write_dropped(self.folder / DROPPED)

    def _claim(self) -> None:
        """Note what decides the weights, samples included, or make sure that the run began with the same samples."""
        file, samples = self.folder / RECIPE, self.material.digest()
        if file.exists() and read_json(file).get(SAMPLES) != samples:
            raise RunError(f"a run must go on with the samples that it began with, got others in {self.folder}'s data")
        self.state.wait_for_everyone()
        if self.state.is_main_process and not file.exists():
            write_json(file, {**self._meaning(), SAMPLES: samples})
        self.state.wait_for_everyone()

    def _meaning(self) -> dict[str, Any]:
        """Return what decides the weights, but for the samples, in JSON's types."""
        meaning: dict[str, Any] = json.loads(json.dumps(self.recipe.meaning()))
        return meaning

    def _start(self) -> Path:
        """Return the folder of the model to start with, after building it if it is one of parts."""
        model = self.recipe.model
        if model.path is not None:
            return Path(model.path)
        folder = self.folder / START
        if self.state.is_main_process and not folder.exists():
            self.say("building the model")
            settings = {"dtype": model.dtype, "seed": self.recipe.seed, **model.settings}
            try:
                built, processor = build(model.llm or "", list(model.encoders), **settings)
            except TypeError as error:  # of a setting
                raise RunError(
                    f"model must be of parts and settings that go together, got {one_line(error)}"
                ) from error
            with whole_folder(folder) as written:
                built.save_pretrained(written)
                processor.save_pretrained(written)
        self.state.wait_for_everyone()
        return folder

    def _folder_of(self, number: int) -> Path:
        return self.folder / "stages" / f"{number + 1}-{self.recipe.stages[number].name}"

    def _seed(self, number: int) -> int:
        return self.recipe.seed * SEEDS + number

    def _bf16(self, stage: StageRecipe) -> bool:
        if stage.bf16 is not None:
            return stage.bf16
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    def _computed_in(self, bf16: bool) -> torch.dtype:
        """Return the dtype of a stage's weights: what is kept in float16 trains in float32."""
        return self.dtype if bf16 and self.dtype != torch.float16 else torch.float32

    def _plan(self, stage: StageRecipe, order: Order) -> Plan:
        world = self.state.num_processes
        piece = stage.batch // (stage.gradient_accumulation * world)
        bf16 = self._bf16(stage)
        longest = [self.material.longest(stage)] * piece
        dtype = self._computed_in(bf16)
        return Plan(stage, self.config, len(order), order.samples, longest, self.material.collator, world, bf16, dtype)

    def _run_stage(self, number: int, stage: StageRecipe, order: Order, start: Path) -> None:
        bf16, seed = self._bf16(stage), self._seed(number)
        set_seed(seed)
        frozen = "encoders" not in stage.train
        model = PalForConditionalGeneration.from_pretrained(
            start, dtype=self._computed_in(bf16), freeze_encoders=frozen, freeze_ffn=False
        )
        chosen = choose(model, stage.train, stage.lora)
        if stage.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        name = self._folder_of(number).name
        checkpoints = self.folder / "checkpoints" / name
        log = Log(self.folder / LOG, stage.name, self.state.is_main_process)
        trainer = StageTrainer(
            model,
            training_arguments(
                self.recipe,
                stage,
                len(order),
                checkpoints,
                seed=seed,
                bf16=bf16,
                world=self.state.num_processes,
                say=self.say,
            ),
            stage=stage,
            chosen=chosen,
            order=order,
            collate=Collate(self._collator(model, stage, order)),
            log=log,
            keep=self.recipe.checkpoint_keep,
            held_out=self.material.held_out,
            eval_steps=self.recipe.eval_steps,
            stop=self.stop,
        )
        trainer.add_callback(Progress(stage.name, self.say))
        earlier = checkpoints_in(checkpoints)
        if earlier:
            self.say(f"stage {stage.name}: goes on after step {earlier[-1].name.partition('-')[2]}")
        else:
            log.cut(0)
        with damage_explained():
            trainer.train(resume_from_checkpoint=str(earlier[-1]) if earlier else None)
        done = trainer.state.global_step
        if trainer.stopped and done < len(order):
            raise Stopped(f"stopped after step {done} of {len(order)} of stage {stage.name}: --resume goes on")
        with damage_explained():
            scores = trainer.evaluate_now() if self.material.held_out else None
        if scores is not None:
            self.say(
                f"stage {stage.name}: loss {scores.eval_loss:.3f}, accuracy {scores.accuracy:.1%} of held-out answers"
            )
        tensors = gather(trainer.model, keep=self.state.is_main_process)
        if self.state.is_main_process:
            self._save(
                self._folder_of(number),
                start,
                stage,
                tensors,
                {"steps": done, "samples": order.samples, "scores": scores and scores.as_dict()},
            )
            shutil.rmtree(checkpoints, ignore_errors=True)
        self.state.wait_for_everyone()

    def _collator(self, model: PalForConditionalGeneration, stage: StageRecipe, order: Order) -> Collator:
        """Return what makes a stage's batches: of kept states where the recipe asks for it and the encoders are frozen.
        The first process encodes, and the others find everything kept."""
        cache = self.recipe.data.cache
        if cache is None or "encoders" in stage.train:
            return self.material.collator
        if torch.cuda.is_available():
            model.audio_tower.to(self.state.device)
        states = EncodedStates(cache or self.folder / "states", list(model.audio_tower), self.processor)
        with self.state.main_process_first(), damage_explained():
            return self.material.of_states(states, stage.name, order, self.say)

    def _save(
        self, folder: Path, start: Path, stage: StageRecipe, tensors: dict[str, torch.Tensor], about: dict[str, Any]
    ) -> None:
        """Save what a stage trained, and the model that it began with, in which that is put."""
        with whole_folder(folder) as written:
            save_trained(tensors, written / TRAINED, stage, self.dtype)
            whole = PalForConditionalGeneration.from_pretrained(start, dtype=self.dtype)
            load_trained(whole, written / TRAINED)
            whole.save_pretrained(written)
            self.processor.save_pretrained(written)
            write_json(written / STAGE, about)
