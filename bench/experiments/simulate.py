"""`palkernels simulate`: what Figure 1 costs at full size on a GPU, found out without one.

The real code of model and method runs on tensors that have shapes and no values (`shapes`). Peak memory is that of
all its allocations (`memory`), time the least that a GPU needs for its FLOPs and bytes (`costs`). All LLM weights
train; the encoder is left out. This library's functions take their Triton path. Nothing is said of the host, which in
eager generation is often the slower one.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from palkernels.bench import machine
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.experiments.measure import COMPARED, SERVING
from palkernels.bench.experiments.settings import (
    check_counts,
    check_length,
    check_methods,
    check_text_tokens,
    dtype_name,
)
from palkernels.bench.instruments.costs import GPUS, CostCounter, Costs, Gpu, function_inside, scratch_bytes
from palkernels.bench.instruments.memory import AllocationTracker
from palkernels.bench.instruments.shapes import Shapes
from palkernels.bench.methods.methods import DEFAULT_METHODS, LEVERS, METHODS, MODES, Batch, Method, make_adamw
from palkernels.bench.presets import LlmPlan, plan_llm
from palkernels.bench.report import document as results
from palkernels.bench.report import files, fits
from palkernels.bench.report.rows import serving_row
from palkernels.bench.report.terminal import print_points
from palkernels.model.connectors.mlp import MlpConnector

__all__ = ["FILES", "OPTIMIZERS", "Options", "Simulation", "World", "run"]

FILES = ("simulate.json", "simulate.csv", "simulate.png", "simulate.html")
OPTIMIZERS = ("none", "adamw")
DTYPES = {"train": torch.bfloat16, "infer": torch.float16}
ENCODER_WIDTH = 1280  # Whisper large's, on which published audio LLMs build
KV_CACHE, LOGITS = "K/V cache", "logits"
# The cost against length: one of the three varies, the others are as in AT.
LENGTHS = {
    "audio_tokens": (64, 256, 1024, 2048, 4096, 6000),
    "text_tokens": (32, 128, 512, 1024),
    "batch_size": (1, 4, 16),
}
AT = {"audio_tokens": 1500, "text_tokens": 128, "batch_size": 8}


@dataclass(frozen=True)
class Options:
    """The command line."""

    model: str = "llama-3.2-1b"
    layers: int | None = None
    methods: tuple[str, ...] = (*DEFAULT_METHODS, *LEVERS)
    audio_tokens: tuple[int, ...] = (512, 1500, 3000)
    text_tokens: tuple[int, ...] = (128,)
    train_batch: int = 8
    infer_batch: int = 12
    new_tokens: int = 32
    optimizer: str = "none"
    lengths: bool = True
    serving: bool = True
    measured: Path | None = None
    out: Path = Path("simulate-out")


def run(options: Options, console: Console) -> Path:
    """Simulate, write the four files and return the report's path.

    Raises:
        UserError: an option, the model, the measured file or the output folder is not usable.
    """
    llm = _check(options)
    measured = None if options.measured is None else results.read(options.measured)
    transformers.logging.set_verbosity_error()
    with results.writable_folder(options.out, FILES), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames what both of its versions have
        document = simulate(options, llm, console)
        if measured is not None and not results.add_errors(document["rows"], measured):
            wanted = f"a run of {llm.name} on {' or '.join(gpu.name for gpu in GPUS.values())} at one of these points"
            got = f"{measured['meta'].get('model')} on {measured['meta'].get('device_name')}"
            raise UserError(f"--measured must hold {wanted}, got {got}")
        results.write_all(options.out, files.contents(document, FILES))
    print_points(document, console)
    return options.out / FILES[-1]


def _check(options: Options) -> LlmPlan:
    for name in ("train_batch", "infer_batch", "new_tokens"):
        check_counts(name, (getattr(options, name),))
    check_counts("audio_tokens", options.audio_tokens)
    check_text_tokens(options.text_tokens)
    check_methods(options.methods)
    for name in options.methods:
        reason = METHODS[name].why_not(torch.device("cuda"))
        if reason:
            raise UserError(f"--methods must be able to run, got {name}: {reason}")
    if options.optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {options.optimizer!r}")
    llm = plan_llm(options.model, options.layers)
    check_length(llm, max(options.audio_tokens) + max(options.text_tokens) + options.new_tokens)
    if options.lengths:
        longest = [
            sum((AT | {varies: max(counts)})[name] for name in ("audio_tokens", "text_tokens"))
            for varies, counts in LENGTHS.items()
        ]
        check_length(llm, max(longest) + 1, "--lengths needs (--no-lengths leaves it out): ")
    if options.serving:
        needed = AT["audio_tokens"] + AT["text_tokens"] + options.new_tokens
        check_length(llm, needed, "--serving needs (--no-serving leaves it out): ")
    return llm


def simulate(options: Options, llm: LlmPlan, console: Console) -> dict[str, Any]:
    """The document that simulate.json holds."""
    try:
        worlds = {mode: World(llm, dtype) for mode, dtype in DTYPES.items()}
        for name in options.methods:
            with worlds["train"].ready(METHODS[name]):  # a model that a method cannot take is known before the sweep
                pass
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    sections: dict[str, list[Callable[[], list[results.Row]]]] = {
        "rows": _points(options, worlds),
        "lengths": _lengths(options, worlds) if options.lengths else [],
        "serving": _serving(options, worlds["infer"], llm) if options.serving else [],
    }
    found: dict[str, list[results.Row]] = {name: [] for name in sections}
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task(llm.name, total=sum(map(len, sections.values())))
        for name, works in sections.items():
            for work in works:
                found[name] += work()
                progress.advance(task)
    exponents = fits.exponents(found["lengths"])
    return {"meta": _meta(options, llm), **found, "exponents": exponents}


def _points(options: Options, worlds: dict[str, World]) -> list[Callable[[], list[results.Row]]]:
    """One for each row of Figure 1."""
    return [
        partial(_rows, options, worlds[mode], METHODS[name], mode, audio, text, rows)
        for mode, rows in (("train", options.train_batch), ("infer", options.infer_batch))
        for text in options.text_tokens
        for audio in options.audio_tokens
        for name in options.methods
        if mode in METHODS[name].modes
    ]


def _lengths(options: Options, worlds: dict[str, World]) -> list[Callable[[], list[results.Row]]]:
    """Training steps as one size varies, and prefills as the audio does."""

    def work(mode: str, name: str, varies: str, count: int) -> list[results.Row]:
        at = AT | {varies: count}
        alone = replace(options, new_tokens=1)
        sizes = (at["audio_tokens"], at["text_tokens"], at["batch_size"])
        rows = _rows(alone, worlds[mode], METHODS[name], mode, *sizes)
        return [{**row, "mode": "train" if mode == "train" else "prefill", "varies": varies} for row in rows]

    return [
        partial(work, mode, name, varies, count)
        for mode in MODES
        for varies, counts in LENGTHS.items()
        if mode == "train" or varies == "audio_tokens"
        for count in counts
        for name in COMPARED
    ]


def _rows(
    options: Options, world: World, method: Method, mode: str, audio: int, text: int, batch: int
) -> list[results.Row]:
    """A row for each GPU."""
    if mode == "train":
        found = world.train(method, audio, text, batch, options.optimizer)
    else:
        found = world.infer(method, audio, text, batch, options.new_tokens)
    rows = []
    for key, gpu in GPUS.items():
        rate = batch / found.costs[key]
        rows.append(
            {
                "method": method.name,
                "mode": mode,
                "audio_tokens": audio,
                "text_tokens": text,
                "batch_size": batch,
                "dtype": dtype_name(world.dtype),
                "impl": found.impl,
                "samples_per_second": {"p50": rate, "samples": [rate]},
                "peak_memory_bytes": found.peak_bytes,
                "peak_above_static_bytes": found.peak_above_static_bytes,
                "memory_source": "tracked tensor allocations, without values",
                "source": "simulated",
                "status": "ok",
                "device": gpu.name,
                "memory_breakdown": found.memory_breakdown,
                "attention_flops": round(found.costs["attention_flops"]),
                "other_flops": round(found.costs["other_flops"]),
                "traffic_bytes": round(found.costs["bytes"]),
                "kernels": round(found.costs["kernels"]),
            }
        )
    return rows


def _serving(options: Options, world: World, llm: LlmPlan) -> list[Callable[[], list[results.Row]]]:
    """Clips with questions about them, answered in one batch."""

    def work(name: str, clips: int, questions: int) -> list[results.Row]:
        method, new = METHODS[name], options.new_tokens
        found = world.infer(method, AT["audio_tokens"], AT["text_tokens"], questions, new, clips)
        assert found.first_token is not None
        rows = []
        for key, gpu in GPUS.items():
            first, rest = found.first_token[key], found.costs[key] - found.first_token[key]
            point = serving_row(method, llm.config, world.dtype, clips, questions, AT, new, first, rest)
            rows.append({**point, "peak_memory_bytes": found.peak_bytes, "source": "simulated", "device": gpu.name})
        return rows

    return [partial(work, name, *point) for point in SERVING for name in COMPARED]


def _meta(options: Options, llm: LlmPlan) -> dict[str, Any]:
    packages = ("palkernels", "torch", "triton", "transformers", "liger-kernel")
    names = {mode: dtype_name(dtype) for mode, dtype in DTYPES.items()}
    return {
        "source": "simulated",
        "gpus": {
            gpu.name: {
                "flops_per_second": gpu.flops,
                "bytes_per_second": gpu.bytes,
                "share_of_flops": Gpu.FLOPS_WITHIN_REACH,
                "share_of_bytes": Gpu.BYTES_WITHIN_REACH,
            }
            for gpu in GPUS.values()
        },
        "versions": {**{name: machine.package_version(name) for name in packages}, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": llm.name,
        "layers": llm.layers,
        "full_layers": llm.full_layers,
        "text_tokens": options.text_tokens[0],
        "new_tokens": options.new_tokens,
        "train_batch": options.train_batch,
        "infer_batch": options.infer_batch,
        "dtype": f"{names['train']} in training, {names['infer']} in inference",
        "optimizer": options.optimizer,
        "connector": f"MLP from {ENCODER_WIDTH}",
        "options": results.recorded(options),
    }


@dataclass(frozen=True)
class Simulation:
    """One method at one point."""

    peak_bytes: int
    peak_above_static_bytes: int
    memory_breakdown: dict[str, int]
    impl: str
    costs: Costs
    first_token: Costs | None = None  # up to the first token; None in training


class World:
    """A model and a connector without values, in one dtype. `impl` is that of this library's functions."""

    def __init__(self, llm: LlmPlan, dtype: torch.dtype, width: int = ENCODER_WIDTH, impl: str = "triton") -> None:
        self.mode, self.dtype, self.width, self.impl = Shapes(), dtype, width, impl
        self.vocab_size: int = llm.config.vocab_size
        with self.mode, _default_dtype(dtype):
            self.model = replace(llm, directory=None).build(dtype, torch.device("cpu"), 0).model  # weights have no say
            self.connector = MlpConnector(width, llm.config.hidden_size)
        self.parameters: list[nn.Parameter] = [*self.model.parameters(), *self.connector.parameters()]

    def train(self, method: Method, audio: int, text: int, rows: int, optimizer: str = "none") -> Simulation:
        """One training step: forward, backward and, if there is one, the optimizer's step."""
        with self.ready(method) as impl:
            parameters = [*self.parameters, *method.own_parameters(self.model)]
            step = None if optimizer == "none" else make_adamw(parameters)
            states = [] if step is None else [x for found in step.state.values() for x in found.values()]
            batch = self._batch(audio, text, rows)
            with CostCounter() as counter, self._tracker([*parameters, *states]) as tracker:
                loss = method.loss(self.model, self.connector, batch)
                tracker.mark()
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                if step is not None:
                    step.step()
            gradients = [p.grad for p in parameters if p.grad is not None]
            memory = tracker.report(static=gradients)
            parts = {"parameters": parameters, "gradients": gradients, "optimizer": states}
            breakdown = tracker.breakdown(parts, kept_at=0)
            for parameter in self.parameters:
                parameter.grad = None
        return Simulation(memory.peak_bytes, memory.peak_above_static_bytes, breakdown, impl, counter.segments[0])

    @torch.no_grad()
    def infer(
        self,
        method: Method,
        audio: int,
        text: int,
        rows: int,
        new_tokens: int,
        clips: int | None = None,
        most_steps: int = 2,
    ) -> Simulation:
        """A prefill and `new_tokens` decoded tokens. At most so many decoding steps run; each of the others costs as
        much more than the one before it as the second does than the first, since caches grow by a token a step."""
        with self.ready(method) as impl:
            parameters = [*self.parameters, *method.own_parameters(self.model)]
            batch = self._batch(audio, text, rows, clips)
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
        first_token = before + prefill
        costs = first_token + sum(steps, Costs())
        left_out = new_tokens - 1 - len(steps)
        if left_out:
            following, last = (_extrapolated(steps[0], steps[1], i) for i in (len(steps), new_tokens - 2))
            both = _extrapolated(following, last, 0.5)  # what grows evenly has the mean of its first and last
            costs += _scaled(both, left_out)
            peaks.append(_extrapolated(peaks[1], peaks[2], new_tokens - 2))
        breakdown = {name: round(size) for name, size in max(peaks, key=Costs.total).items()}
        peak = sum(breakdown.values())
        return Simulation(peak, peak - breakdown["parameters"], breakdown, impl, costs, first_token)

    def _batch(self, audio: int, text: int, rows: int, clips: int | None = None) -> Batch:
        clip = torch.empty(audio, self.width, dtype=self.dtype)
        return Batch.make(clip, rows, text, self.vocab_size, 0, clips)

    @contextlib.contextmanager
    def ready(self, method: Method) -> Iterator[str]:
        """Yields the name of the attention that runs."""
        with self.mode, _no_launches(), _no_collection(), method.ready(self.model, self.impl) as impl:
            yield impl

    def _tracker(self, static: Sequence[Tensor], *, caches: bool = False) -> AllocationTracker:
        def name(func: Any, args: tuple[Any, ...], tensor: Tensor) -> str | None:
            if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[-1] == self.vocab_size:
                return LOGITS
            # transformers' caches join old and new keys, (B, Hkv, S, D), along S.
            joins = func is torch.ops.aten.cat.default and args[1:] == (-2,)
            return KV_CACHE if caches and (joins or func._schema.name.startswith("palkernels::audio_kv")) else None

        return AllocationTracker(static, name=name, scratch=scratch_bytes, inside=function_inside)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _no_launches() -> Iterator[None]:
    """Triton kernels that other packages launch from Python, without an operator around them, have nothing to do."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    with mock.patch.object(JITFunction, "run", nothing), mock.patch.object(InterpretedFunction, "run", nothing):
        yield


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Cycles of references would be freed at moments that depend on what ran before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _scaled(costs: Costs, factor: float) -> Costs:
    return Costs({name: value * factor for name, value in costs.items()})


def _extrapolated(first: Costs, second: Costs, steps: float) -> Costs:
    """What comes `steps` after the first, if every step adds as much as the second did."""
    return Costs({name: first[name] + (second[name] - first[name]) * steps for name in first | second})
