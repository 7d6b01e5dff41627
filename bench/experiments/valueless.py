"""A model without values, on which one training step or one generation shows what it costs.

The real code of model and method runs on tensors that have shapes and no values (`shapes`). Peak memory is that of all
its allocations (`memory`). A step's time is the least that a GPU needs for its FLOPs and bytes (`costs`), or in eager
mode the time in which its host launches the kernels, where that is longer.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from palkernels.bench.experiments.optimizer import make_adamw
from palkernels.bench.instruments.costs import LAUNCHES, CostCounter, Costs
from palkernels.bench.instruments.memory import AllocationTracker
from palkernels.bench.instruments.rates import HOST
from palkernels.bench.instruments.shapes import Shapes
from palkernels.bench.methods import Batch, Method
from palkernels.bench.presets import LlmPlan
from palkernels.model.connectors.mlp import MlpConnector
from palkernels.op_costs import arguments_by_name, plain_function, scratch_bytes

__all__ = ["ENCODER_WIDTH", "LOGITS", "Simulation", "ValuelessModel", "default_dtype", "no_collection", "no_launches"]

ENCODER_WIDTH = 1280  # Whisper large's, on which published audio LLMs build
KV_CACHE, LOGITS = "K/V cache", "logits"


@dataclass(frozen=True)
class Simulation:
    """What one method costs at one point."""

    peak_bytes: int
    peak_above_static_bytes: int
    memory_breakdown: dict[str, int]
    impl: str
    steps: tuple[Costs, ...]  # one step of training; or all up to the first token, and each decoding step
    training: bool

    @property
    def costs(self) -> Costs:
        """The costs of all steps."""
        return sum(self.steps, Costs())

    @property
    def host_seconds(self) -> float:
        """The seconds in which the host launches all kernels, one by one."""
        return sum(map(self._host_seconds, self.steps))

    def captured_seconds(self, gpu: str) -> list[float]:
        """Return each step's seconds on a GPU of `rates` where a step is one CUDA graph: the GPU's, and a launch."""
        return [step[gpu] + HOST.seconds(1, 0, training=self.training) for step in self.steps]

    def eager_seconds(self, gpu: str) -> list[float]:
        """Return each step's seconds where the host launches every kernel: its own, or the GPU's if that is longer.
        No step begins before the one before it has ended, as generation reads each token."""
        return list(map(max, self.captured_seconds(gpu), map(self._host_seconds, self.steps)))

    def _host_seconds(self, step: Costs) -> float:
        return HOST.seconds(step["kernels"], step["our_kernels"], training=self.training)


class ValuelessModel:
    """A model and a connector without values, in one dtype. `impl` is this library's implementation that runs."""

    def __init__(self, llm: LlmPlan, dtype: torch.dtype, width: int = ENCODER_WIDTH, impl: str = "triton") -> None:
        self.mode, self.dtype, self.width, self.impl = Shapes(), dtype, width, impl
        self.vocab_size: int = llm.config.vocab_size
        with self.mode, default_dtype(dtype):
            self.model = replace(llm, directory=None).build(dtype, torch.device("cpu"), 0).model  # reads no weights
            self.connector = MlpConnector(width, llm.config.hidden_size)
        self.parameters: list[nn.Parameter] = [*self.model.parameters(), *self.connector.parameters()]

    def train(self, method: Method, audio: int, text: int, batch_size: int, optimizer: str = "none") -> Simulation:
        """Simulate one training step: forward, backward and, with the optimizer "adamw", its step."""
        with self.ready(method) as impl:
            parameters = [*self.parameters, *method.added_parameters(self.model)]
            adamw = None if optimizer == "none" else make_adamw(parameters)
            states = [] if adamw is None else [x for of_one in adamw.state.values() for x in of_one.values()]
            batch = self._batch(audio, text, batch_size)
            with CostCounter() as counter, self._tracker([*parameters, *states]) as tracker:
                loss = method.loss(self.model, self.connector, batch)
                tracker.mark()
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                if adamw is not None:
                    adamw.step()
            gradients = [p.grad for p in parameters if p.grad is not None]
            memory = tracker.report(static=gradients)
            parts = {"parameters": parameters, "gradients": gradients, "optimizer": states}
            breakdown = tracker.breakdown(parts, kept_at=0)
            for parameter in self.parameters:
                parameter.grad = None
        peaks = memory.peak_bytes, memory.peak_above_static_bytes
        return Simulation(*peaks, breakdown, impl, (counter.segments[0],), training=True)

    @torch.no_grad()
    def infer(
        self,
        method: Method,
        audio: int,
        text: int,
        batch_size: int,
        new_tokens: int,
        clips: int | None = None,
        most_steps: int = 2,
    ) -> Simulation:
        """Simulate a prefill and `new_tokens` decoded tokens.

        At most `most_steps` decoding steps run. Caches grow by a token a step, so each of the others costs as much more
        than the one before it as the second step does than the first. Launches do not grow: the others make those of
        the first, as the last step of a generation makes fewer.
        """
        with self.ready(method) as impl:
            parameters = [*self.parameters, *method.added_parameters(self.model)]
            batch = self._batch(audio, text, batch_size, clips)
            with CostCounter() as counter, self._tracker(parameters, caches=True) as tracker:

                def mark(*_: Any) -> None:
                    counter.mark()
                    tracker.mark()

                hook = self.model.register_forward_pre_hook(mark)
                try:
                    method.generate(self.model, self.connector, batch, min(new_tokens, 1 + most_steps))
                finally:
                    hook.remove()
            before, prefill, *steps = counter.segments
            segments = [(0, 1), *((i + 2, i + 2) for i in range(len(steps)))]
            peaks = [Costs(tracker.breakdown({"parameters": parameters}, segment)) for segment in segments]
        run = len(steps)
        if run < new_tokens - 1:
            steps += [_extrapolated(steps[0], steps[1], i) for i in range(run, new_tokens - 1)]
            peaks.append(_extrapolated(peaks[1], peaks[2], new_tokens - 2))
        breakdown = {name: round(size) for name, size in max(peaks, key=Costs.total).items()}
        peak = sum(breakdown.values())
        above = peak - breakdown["parameters"]
        return Simulation(peak, above, breakdown, impl, (before + prefill, *steps), training=False)

    def _batch(self, audio: int, text: int, batch_size: int, clips: int | None = None) -> Batch:
        clip = torch.empty(audio, self.width, dtype=self.dtype)
        return Batch.make(clip, batch_size, text, self.vocab_size, 0, clips)

    @contextlib.contextmanager
    def ready(self, method: Method) -> Iterator[str]:
        """Make the model usable with a method; yields the name of the attention that runs."""
        with self.mode, no_launches(), no_collection(), method.ready(self.model, self.impl) as impl:
            yield impl

    def _tracker(self, static: Sequence[Tensor], *, caches: bool = False) -> AllocationTracker:
        def name(func: Any, args: tuple[Any, ...], tensor: Tensor) -> str | None:
            if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] == self.vocab_size:
                return LOGITS
            if not caches:
                return None
            if func is torch.ops.aten.cat.default:
                # transformers' caches join old and new keys, (B, Hkv, S, D), along S.
                return KV_CACHE if arguments_by_name(func, args, {}).get("dim") == -2 else None
            return KV_CACHE if func._schema.name.startswith("palkernels::audio_kv") else None

        return AllocationTracker(static, name=name, scratch=scratch_bytes, inside=plain_function)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Let the Triton kernels that other packages launch from Python, without an operator around them, do nothing."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    runs = {kernel: vars(kernel)["run"] for kernel in (JITFunction, InterpretedFunction)}
    for kernel in runs:
        kernel.run = nothing
    try:
        yield
    finally:
        for kernel, run in runs.items():
            kernel.run = run


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Turn the garbage collector off, which would free cycles at moments that depend on what ran before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _extrapolated(first: Costs, second: Costs, steps: float) -> Costs:
    """Return the costs `steps` after the first, if every step adds as much as the second did, but no launches."""
    added = {name: (second[name] - first[name]) * steps for name in first | second}
    return Costs({name: first[name] + (0 if name in LAUNCHES else more) for name, more in added.items()})
