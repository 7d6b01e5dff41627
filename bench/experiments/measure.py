"""Measuring one point of Figure 1: every method in turn, its memory first, then its time."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from palkernels.bench import machine
from palkernels.bench.errors import UserError
from palkernels.bench.experiments.optimizer import make_adamw
from palkernels.bench.experiments.settings import Settings
from palkernels.bench.instruments.memory import AllocationTracker, MemoryReport
from palkernels.bench.instruments.timing import wall_seconds
from palkernels.bench.methods import Batch, Method
from palkernels.bench.report import document as results
from palkernels.bench.report.roles import BASELINE, OURS
from palkernels.bench.report.serving import serving_row
from palkernels.model.encoders.whisper import WhisperAudioEncoder
from palkernels.op_costs import plain_function, scratch_bytes

__all__ = ["COMPARED", "SERVING", "Bench", "infer", "measure_point", "measure_serving"]

COMPARED = (BASELINE, OURS)  # in serving, and against length
SERVING = ((1, 1), (1, 8), (1, 32), (12, 12))  # clips, and questions about them


@dataclass
class Bench:
    """Everything that the measurements share."""

    settings: Settings
    model: Any
    connector: nn.Module
    clips: dict[int, Tensor]  # audio tokens -> encoder states (N, width)
    encoder: WhisperAudioEncoder
    waveform: Tensor  # the clip (samples,)
    llm_weights: str
    audio_digest: str
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    added_parameters: list[nn.Parameter] = field(default_factory=list)  # by the method whose turn it is
    added_optimizer: torch.optim.Optimizer | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.settings.llm.config.vocab_size)

    @property
    def serving_sizes(self) -> dict[str, int]:
        """The tokens of each question: the longest clip, and the text of the other points."""
        return {"audio_tokens": max(self.settings.audio_tokens), "text_tokens": self.settings.text_tokens}

    def release_training(self) -> None:
        """Free optimizer and gradients, which inference does not need: they must not weigh on its peaks."""
        self.optimizer = None
        self.model.zero_grad(set_to_none=True)
        self.connector.zero_grad(set_to_none=True)
        machine.release_memory(self.settings.device)

    def static(self) -> list[Tensor]:
        """Return parameters, their gradients and the optimizer's states, as far as they exist now."""
        parameters = [*self.parameters, *self.added_parameters]
        grads = [p.grad for p in parameters if p.grad is not None]
        optimizers = [x for x in (self.optimizer, self.added_optimizer) if x is not None]
        return [*parameters, *grads, *(t for x in optimizers for s in x.state.values() for t in s.values())]

    @contextmanager
    def with_parameters_of(self, method: Method, mode: str) -> Iterator[None]:
        """Include the parameters that a method adds to the model while it is ready."""
        parameters = method.added_parameters(self.model)
        self.added_parameters = parameters
        self.added_optimizer = make_adamw(parameters) if parameters and mode == "train" else None
        try:
            yield
        finally:
            self.added_parameters, self.added_optimizer = [], None


@dataclass
class _Series:
    """One method at one point, while it is measured."""

    samples: list[float] = field(default_factory=list)  # samples per second
    memory: MemoryReport | None = None
    impl: str = ""
    status: str = "ok"


def measure_point(bench: Bench, mode: str, count: int) -> list[results.Row]:
    """Return a row for each method that has this mode, at one number of audio tokens."""
    settings = bench.settings
    batch_size, text = settings.batch[mode], settings.text_tokens
    methods = [method for method in settings.methods if mode in method.modes]
    series = {method.name: _Series(status=method.why_not(settings.device) or "ok") for method in methods}
    clip = bench.clips[count]
    batch = _batch(bench, series, lambda: Batch.make(clip, batch_size, text, bench.vocab_size, settings.seed))
    for turn in range(settings.repeats[mode] + 1):
        for method in methods:
            if batch is not None and series[method.name].status == "ok":
                _take_turn(bench, method, mode, batch, series[method.name], memory_pass=turn == 0)
    cuda = settings.device.type == "cuda"
    point = []
    for method in methods:
        current = series[method.name]
        ok = current.status == "ok"
        memory, samples = (current.memory, current.samples) if ok else (None, [])
        point.append(
            {
                "method": method.name,
                "mode": mode,
                "audio_tokens": count,
                "text_tokens": text,
                "batch_size": batch_size,
                "dtype": settings.dtype_name,
                "impl": current.impl,
                "samples_per_second": {
                    "p50": statistics.median(samples) if samples else None,
                    "samples": samples,
                },
                "peak_memory_bytes": memory and memory.peak_bytes,
                "peak_above_static_bytes": memory and memory.peak_above_static_bytes,
                "memory_source": "cuda caching allocator" if cuda else "tracked tensor allocations",
                "source": "measured",
                "status": current.status,
            }
        )
    return point


def measure_serving(bench: Bench, clips: int, questions: int) -> list[results.Row]:
    """Return a row for each method in COMPARED: the time to the first token of all questions, and the rate of the
    others."""
    settings, sizes = bench.settings, bench.serving_sizes
    methods = [method for method in settings.methods if method.name in COMPARED]
    series = {method.name: _Series() for method in methods}
    clip, text = bench.clips[sizes["audio_tokens"]], sizes["text_tokens"]
    batch = _batch(
        bench, series, lambda: Batch.make(clip, questions, text, bench.vocab_size, settings.seed, clips=clips)
    )
    first: dict[str, list[float]] = {method.name: [] for method in methods}
    for turn in range(settings.repeats["infer"] + 1):
        for method in methods:
            current = series[method.name]
            if batch is None or current.status != "ok":
                continue
            with _recording_memory(bench, current), method.ready(bench.model) as current.impl:
                one = _seconds(lambda: infer(bench, method, batch, 1), settings.device)  # noqa: B023
                whole = _seconds(lambda: infer(bench, method, batch), settings.device)  # noqa: B023
                if turn:  # the first is the warm-up
                    first[method.name].append(one)
                    current.samples.append(whole - one)
    rows = []
    for method in methods:
        current = series[method.name]
        times: tuple[float | None, float | None] = (None, None)
        if current.status == "ok":
            times = statistics.median(first[method.name]), statistics.median(current.samples)
        config, new = settings.llm.config, settings.new_tokens
        row = serving_row(method, config, settings.dtype, clips, questions, sizes, new, *times)
        rows.append({**row, "source": "measured", "status": current.status})
    return rows


def _batch(bench: Bench, series: dict[str, _Series], make: Callable[[], Batch]) -> Batch | None:
    """Return the batch, or None where it does not fit into memory; then every series says so."""
    batch: Batch | None = None
    for current in series.values():
        with _recording_memory(bench, current):
            batch = batch or make()
    return batch


@contextmanager
def _recording_memory(bench: Bench, series: _Series) -> Iterator[None]:
    """Where memory does not suffice, note it in `series` and free everything."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
    # Outside the except block, so that the error's traceback and the tensors in its frames are gone.
    series.status = "out of memory"
    bench.model.zero_grad(set_to_none=True)
    bench.connector.zero_grad(set_to_none=True)
    machine.release_memory(bench.settings.device)


def _take_turn(bench: Bench, method: Method, mode: str, batch: Batch, series: _Series, memory_pass: bool) -> None:
    """Run one pass of one method and add what it measured to its series."""

    def work() -> None:
        if mode == "train":
            _check_loss(_train_step(bench, method, batch), method, bench.settings)
        else:
            infer(bench, method, batch)

    with _recording_memory(bench, series):
        if mode == "train" and bench.optimizer is None:
            bench.optimizer = make_adamw(bench.parameters)
        with method.ready(bench.model) as series.impl, bench.with_parameters_of(method, mode):
            if memory_pass:
                series.memory = _measure_memory(bench, batch, work)
            else:
                series.samples.append(len(batch.labels) / _seconds(work, bench.settings.device))


def _train_step(bench: Bench, method: Method, batch: Batch) -> Tensor:
    optimizers = [x for x in (bench.optimizer, bench.added_optimizer) if x is not None]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = method.loss(bench.model, bench.connector, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def _check_loss(loss: Tensor, method: Method, settings: Settings) -> None:
    if not math.isfinite(loss.item()):
        raise UserError(f"{method.label}'s training loss must be finite, got {loss.item()} in {settings.dtype_name}")


@torch.no_grad()
def infer(bench: Bench, method: Method, batch: Batch, new_tokens: int | None = None) -> Tensor:
    """Return the tokens of one generation; called inside the method's `ready`."""
    new_tokens = new_tokens or bench.settings.new_tokens
    tokens = method.generate(bench.model, bench.connector, batch, new_tokens)
    wanted = (batch.input_ids.shape[0], new_tokens)
    if tokens.shape != wanted:  # a shorter answer would be a faster one
        raise RuntimeError(f"{method.name} must generate {wanted} tokens, got {tuple(tokens.shape)}")
    return tokens


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one pass, in which no garbage of the one before is collected."""
    gc.collect()
    return wall_seconds(work, device)


def _measure_memory(bench: Bench, batch: Batch, work: Callable[[], None]) -> MemoryReport:
    """Run the memory pass, which is also the warm-up, and return its peaks.

    On CUDA the total is the most that the caching allocator had handed out, kernels' scratch and rounding included,
    less the inputs. It comes from a pass without the tracker, under which autograd allocates a little more. The part
    above the static one is the tracker's on every device: the allocator does not know what a block belongs to.
    """
    device = bench.settings.device
    # Without the last step's gradients, which this one's zero_grad would free anyway, all methods start alike.
    bench.model.zero_grad(set_to_none=True)
    bench.connector.zero_grad(set_to_none=True)
    hidden: dict[str, Any] = {"scratch": scratch_bytes, "inside": plain_function}
    with AllocationTracker(static=bench.static(), device=device.type, **hidden) as tracker:
        work()
    report: MemoryReport = tracker.report(static=bench.static())
    if device.type == "cuda":
        machine.release_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        machine.sync(device)
        inputs = (*bench.clips.values(), batch.states, batch.input_ids, batch.labels)
        total = torch.cuda.max_memory_allocated(device) - sum(tensor.nbytes for tensor in inputs)
        report = replace(report, peak_bytes=total)
    return report
