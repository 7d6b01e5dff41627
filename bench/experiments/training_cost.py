"""What a stage of a recipe costs, predicted before it begins: the model's own code on tensors without values.

A step's memory is that of its longest samples, with AdamW's states, and its time that of the GPU by a roofline, or of
its host, which launches the kernels, where that is longer. The encoders are part of both. What processes send to each
other is left out: it overlaps with the backward pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palkernels.bench.experiments.optimizer import make_adamw
from palkernels.bench.experiments.valueless import LOGITS, Simulation, default_dtype, no_collection, no_launches
from palkernels.bench.instruments.costs import CostCounter
from palkernels.bench.instruments.memory import AllocationTracker
from palkernels.bench.instruments.shapes import Shapes
from palkernels.model import PalForConditionalGeneration
from palkernels.model.training.order import only_foretold
from palkernels.model.training.stages import choose, parameter_groups
from palkernels.op_costs import plain_function, scratch_bytes

__all__ = ["StageCost", "simulate_stage"]

SHARDED = ("parameters", "gradients", "optimizer")  # what FSDP2 shares out


@dataclass(frozen=True)
class StageCost:
    """One piece of a step of a stage on one process, and how many there are.

    Attributes:
        simulation: Of the piece, with the optimizer's step.
        trained, parameters: How many parameters train, and how many there are.
        pieces: Of all steps of one process.
        gathered_bytes: The largest layer's weights, which FSDP2 has whole while it is at work, and the next one's.
    """

    simulation: Simulation
    trained: int
    parameters: int
    pieces: int
    gathered_bytes: int

    def memory(self, sharded_over: int = 1) -> int:
        """Return the bytes a GPU needs, by DDP, or with FSDP2 over several."""
        if sharded_over == 1:
            return self.simulation.peak_bytes
        static = sum(self.simulation.memory_breakdown.get(name, 0) for name in SHARDED)
        return self.simulation.peak_bytes - static + static // sharded_over + 2 * self.gathered_bytes

    def seconds(self, gpu: str) -> float:
        """Return the time of the whole stage on a GPU of ``rates``."""
        return sum(self.simulation.eager_seconds(gpu)) * self.pieces


def simulate_stage(
    stage: Any,
    config: Any,
    batch: dict[str, Any],
    steps: int,
    dtype: torch.dtype,
    bf16: bool,
    impl: str = "triton",
) -> StageCost:
    """Return what a stage costs.

    Args:
        stage: Of a recipe.
        config: The model's.
        batch: A piece of a step, as a collator makes it.
        steps: How many the stage has.
        dtype: Of the weights that do not train.
        bf16: Whether products are computed in bfloat16.
        impl: The implementation that runs: "triton" on a GPU, "sdpa" on a CPU.
    """
    config = copy.deepcopy(config)
    config.impl, config.freeze_encoders, config.freeze_ffn = impl, "encoders" not in stage.train, False
    config.text_config.dtype = dtype
    mode = Shapes()
    with mode, no_launches(), no_collection(), default_dtype(dtype):
        with mode.zeros_for_values():
            model = PalForConditionalGeneration(config).train()
        with _unmoved():
            chosen = choose(model, stage.train, stage.lora)
        if stage.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        parameters = list(model.parameters())
        trained = [x for group in parameter_groups(model, chosen, stage) for x in group["params"]]
        adamw = make_adamw(trained)
        states = [x for of_one in adamw.state.values() for x in of_one.values()]
        inputs = {name: _without_values(value) for name, value in only_foretold(batch).items()}
        vocabulary = config.text_config.vocab_size

        def name(func: Any, args: tuple[Any, ...], tensor: Tensor) -> str | None:
            logits = tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] == vocabulary
            return LOGITS if logits else None

        tracker = AllocationTracker([*parameters, *states], name=name, scratch=scratch_bytes, inside=plain_function)
        with CostCounter() as counter, tracker:
            with _autocast(bf16):
                loss = model(**{**inputs, "use_cache": False}).loss
            tracker.mark()
            loss.backward()
            del loss
            adamw.step()
        gradients = [x.grad for x in trained if x.grad is not None]
        memory = tracker.report(static=gradients)
        parts = {"parameters": parameters, "gradients": gradients, "optimizer": states}
        breakdown = tracker.breakdown(parts, kept_at=0)
        layers = model.language_model.get_decoder().layers
        largest = max(sum(x.nbytes for x in layer.parameters()) for layer in layers)
    peaks = memory.peak_bytes, memory.peak_above_static_bytes
    simulation = Simulation(*peaks, breakdown, impl, (counter.segments[0],), training=True)
    count = sum(x.numel() for x in parameters)
    return StageCost(simulation, sum(x.numel() for x in trained), count, steps * stage.gradient_accumulation, largest)


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """Let modules stay where they are: peft moves new adapters to where they are already, which tensors without values
    do not take."""
    move = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]


@contextlib.contextmanager
def _autocast(bf16: bool) -> Iterator[None]:
    if not bf16:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16):
        yield


def _without_values(value: Any) -> Any:
    """Return an input of a batch as the simulation takes it."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype) if value.is_floating_point() else value
    return [_without_values(item) for item in value] if isinstance(value, list | tuple) else value
