"""What transformers' Trainer is told of a stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainingArguments

from palkernels.model.training.recipe import Recipe, StageRecipe

__all__ = ["training_arguments"]


def training_arguments(
    recipe: Recipe,
    stage: StageRecipe,
    steps: int,
    folder: Path,
    *,
    seed: int,
    bf16: bool,
    world: int,
    say: Callable[[str], None],
) -> TrainingArguments:
    """Return a stage's arguments.

    Args:
        recipe: The whole run's.
        stage: The stage.
        steps: How many it has.
        folder: Of its checkpoints.
        seed: Of its chance.
        bf16: Whether it computes in bfloat16.
        world: How many processes there are.
        say: Takes a line for the user.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=stage.batch // (stage.gradient_accumulation * world),
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=next(iter(stage.lr.values())),
        max_grad_norm=stage.clip,
        weight_decay=stage.weight_decay,
        bf16=bf16,
        seed=seed,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps,
        report_to=list(recipe.report_to),
        run_name=f"{Path(recipe.output).name}-{stage.name}",
        remove_unused_columns=False,
        dataloader_num_workers=recipe.data.workers,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.device.type == "cpu":
        # Of several processes each would be on "cpu:0", of which torch 2.11 loads no checkpoint.
        arguments.__dict__["_setup_devices"] = torch.device("cpu")
    elif arguments.n_gpu > 1:
        say(f"one of {arguments.n_gpu} GPUs trains: accelerate launch -m palkernels.bench.cli train ... takes all")
        arguments._n_gpu = 1  # else Trainer splits batches, clips and texts apart, by DataParallel
    return arguments
