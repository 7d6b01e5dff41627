"""Figure 1 of the paper on this machine: memory and throughput of PLITS and LAL against the number of audio
tokens.

One encoder, one connector and one language model serve every method. For each number of audio tokens it
measures

- train: one full step (zero_grad, connector, forward, backward, fused AdamW); all LLM weights and the
  connector train;
- infer: the prefill and a fixed number of greedily decoded tokens.

The encoder runs once beforehand and counts in neither time nor memory; the connector counts in both. The
first pass of each method is the warm-up and the memory pass; then the methods take turns (A B A B ...), so
that a drift of the machine hits all of them. A point that does not fit into memory is recorded as such and
the sweep goes on.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from palkernels.bench import estimate, machine, plot, results
from palkernels.bench.clip import bundled_clip
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.memory import AllocationTracker, MemoryReport
from palkernels.bench.methods import LEARNING_RATE, METHODS, MODES, Batch, Method, make_adamw
from palkernels.bench.settings import Options, Settings, fit_time, reductions, settle
from palkernels.model.audio_files import load_audio
from palkernels.model.connectors import MlpConnector
from palkernels.model.encoders import WhisperAudioEncoder

__all__ = ["FILES", "Options", "run"]

FILES = ("figure1.json", "figure1.csv", "figure1.png")


def run(options: Options, console: Console) -> Path:
    """Measure, write the three files and return the plot's path.

    Raises:
        UserError: an option, the audio file, the model or the output folder is not usable.
    """
    settings = settle(options)
    with results.writable_folder(options.out, FILES):
        audio_file, waveform = _read_audio(options.audio)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # The calibration also starts PyTorch's threads, whose stacks the memory limit would count otherwise.
        rates = estimate.calibrate(settings.device, settings.dtype)
        limit = machine.memory_limit() if settings.device.type == "cpu" else nullcontext()
        with limit:
            bench = _build(options, settings, waveform)
            settings = bench.settings = fit_time(options, settings, sum(_expected_seconds(bench, rates).values()))
            _introduce(options, bench, rates, console)
            rows = _sweep(bench, rates, console)
        meta = _meta(options, settings, bench, audio_file)
        document = {"meta": meta, "rows": rows}
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        png = plot.render(document)
        contents = (text.encode(), results.csv_text(rows, bench.encoder_weights).encode(), png)
        results.write_all(options.out, dict(zip(FILES, contents, strict=True)))
    labels = {name: method.label for name, method in METHODS.items()}
    console.print(results.summary_table(rows, labels, bench.encoder_weights))
    return options.out / FILES[2]


def _read_audio(path: Path | None) -> tuple[str, Tensor]:
    """What to call the file in results, and its samples."""
    try:
        return str(path or "bundled clip"), load_audio(path or bundled_clip(), 16_000)
    except (ValueError, FileNotFoundError, ImportError) as error:  # AudioError is a ValueError
        raise UserError(one_line(error)) from error


@dataclass
class Bench:
    """Everything that the measurements share."""

    settings: Settings
    model: Any
    connector: nn.Module
    clips: dict[int, Tensor]  # audio tokens -> encoder states (N, width)
    llm_weights: str
    encoder_size: str
    encoder_weights: str
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None

    def static(self) -> list[Tensor]:
        """Parameters, their gradients and the optimizer's states, as far as they exist now."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        states = [] if self.optimizer is None else [t for s in self.optimizer.state.values() for t in s.values()]
        return [*self.parameters, *grads, *states]


def _build(options: Options, settings: Settings, waveform: Tensor) -> Bench:
    """Encode the clip, then build the connector and the language model."""
    try:
        encoder = WhisperAudioEncoder.build(
            options.encoder_size, options.encoder_checkpoint, seed=settings.seed, device=str(settings.device)
        )
    except ValueError as error:
        raise UserError(f"encoder: {one_line(error)}") from error
    clips = {count: encoder.encode(waveform, count).to(settings.dtype) for count in settings.audio_tokens}
    try:
        llm = settings.llm.build(settings.dtype, settings.device, settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(settings.seed)
            connector = MlpConnector(encoder.hidden_size, settings.llm.config.hidden_size)
        connector = connector.to(settings.device, settings.dtype)
        for method in settings.methods:
            with method.ready(llm.model):  # a model that a method cannot take is known before the sweep
                pass
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        raise UserError(f"{settings.llm.name} must fit into memory, got too little: try fewer --layers") from error
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    bench = Bench(settings, llm.model, connector, clips, llm.weights, encoder.size, encoder.weights)
    bench.parameters = [*llm.model.parameters(), *connector.parameters()]
    return bench


def _introduce(options: Options, bench: Bench, rates: estimate.Rates, console: Console) -> None:
    """Say what is measured, what was reduced to suit a CPU, and how long it will take."""
    settings, seconds = bench.settings, sum(_expected_seconds(bench, rates).values())
    lines = (
        f"{settings.llm.name}, {settings.llm.layers} of {settings.llm.full_layers} layers, {settings.dtype_name}, "
        f"on {settings.device}; LLM weights {bench.llm_weights}",
        f"Whisper {bench.encoder_size}, encoder weights {bench.encoder_weights}",
        reductions(options, settings),
        f"Estimated time: {_duration(seconds)}",
    )
    for line in filter(None, lines):
        console.print(line, soft_wrap=True, highlight=False)


def _sweep(bench: Bench, rates: estimate.Rates, console: Console) -> list[results.Row]:
    settings, expected = bench.settings, _expected_seconds(bench, rates)
    rows: list[results.Row] = []
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(expected.values()))
        for mode, count in expected:
            progress.update(task, description=f"{mode}, {count} audio tokens")
            if mode == "infer" and bench.optimizer is not None:
                # Inference needs no optimizer: its memory must not weigh on the peaks.
                bench.optimizer = None
                bench.model.zero_grad(set_to_none=True)
                bench.connector.zero_grad(set_to_none=True)
                machine.release_memory(settings.device)
            point = _measure_point(bench, mode, count)
            rows += point
            progress.advance(task, expected[mode, count])
            progress.console.print(_point_line(mode, count, point), soft_wrap=True, highlight=False)
    return rows


def _expected_seconds(bench: Bench, rates: estimate.Rates) -> dict[tuple[str, int], float]:
    """By mode and number of audio tokens: all passes of all methods, in the order of the sweep."""
    settings = bench.settings
    size = sum(p.nbytes for p in bench.parameters)
    expected = {}
    for mode in MODES:
        for count in settings.audio_tokens:
            total = 0.0
            for method in settings.methods:
                shape = (count, settings.text_tokens, settings.batch[mode], size)
                work = (settings.llm.config, rates, method.audio_in_sequence, *shape)
                if mode == "train":
                    total += estimate.train_seconds(*work)
                else:
                    total += estimate.infer_seconds(*work, settings.new_tokens)
            expected[mode, count] = total * (settings.repeats[mode] + 1)  # and the memory pass
    return expected


def _duration(seconds: float) -> str:
    return f"about {math.ceil(seconds / 5) * 5} s" if seconds < 60 else f"about {math.ceil(seconds / 60)} min"


def _point_line(mode: str, count: int, rows: list[results.Row]) -> str:
    parts = []
    for row in rows:
        p50 = row["samples_per_second"]["p50"]
        parts.append(f"{METHODS[row['method']].label} {row['status'] if p50 is None else f'{p50:.3g} samples/s'}")
    return f"{mode}, {count} audio tokens: {', '.join(parts)}"


@dataclass
class _Series:
    """One method at one point, while it is measured."""

    samples: list[float] = field(default_factory=list)  # samples per second
    memory: MemoryReport | None = None
    impl: str = ""
    fits: bool = True


def _measure_point(bench: Bench, mode: str, count: int) -> list[results.Row]:
    settings = bench.settings
    rows, text = settings.batch[mode], settings.text_tokens
    series = {method.name: _Series() for method in settings.methods}
    batch = None
    try:
        batch = Batch.make(bench.clips[count], rows, text, settings.llm.config.vocab_size, settings.seed)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        for current in series.values():
            current.fits = False
    for turn in range(settings.repeats[mode] + 1):
        for method in settings.methods:
            if batch is not None and series[method.name].fits:
                _take_turn(bench, method, mode, batch, series[method.name], memory_pass=turn == 0)
    cuda = settings.device.type == "cuda"
    point = []
    for method in settings.methods:
        current = series[method.name]
        memory = current.memory if current.fits else None
        samples = current.samples if current.fits else []
        point.append(
            {
                "method": method.name,
                "mode": mode,
                "audio_tokens": count,
                "text_tokens": text,
                "batch_size": rows,
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
                "status": "ok" if current.fits else "out of memory",
            }
        )
    return point


def _take_turn(bench: Bench, method: Method, mode: str, batch: Batch, series: _Series, memory_pass: bool) -> None:
    """One pass of one method. If memory does not suffice, `series` says so and everything is freed."""
    device = bench.settings.device

    def work() -> None:
        if mode == "train":
            _check_loss(_train_step(bench, method, batch), method, bench.settings)
        else:
            _infer(bench, method, batch)

    try:
        if mode == "train" and bench.optimizer is None:
            bench.optimizer = make_adamw(bench.parameters)
        with method.ready(bench.model) as series.impl:
            if memory_pass:
                series.memory = _measure_memory(bench, batch, work)
            else:
                series.samples.append(batch.states.shape[0] / _seconds(work, device))
        return
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
    # Outside the except block, so that the error's traceback and the tensors in its frames are gone.
    series.fits = False
    bench.model.zero_grad(set_to_none=True)
    bench.connector.zero_grad(set_to_none=True)
    machine.release_memory(device)


def _train_step(bench: Bench, method: Method, batch: Batch) -> Tensor:
    assert bench.optimizer is not None
    bench.optimizer.zero_grad(set_to_none=True)
    loss = method.loss(bench.model, bench.connector, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    bench.optimizer.step()
    return loss.detach()


def _check_loss(loss: Tensor, method: Method, settings: Settings) -> None:
    if not math.isfinite(loss.item()):
        raise UserError(f"{method.label}'s training loss must be finite, got {loss.item()} in {settings.dtype_name}")


@torch.no_grad()
def _infer(bench: Bench, method: Method, batch: Batch) -> Tensor:
    tokens = method.generate(bench.model, bench.connector, batch, bench.settings.new_tokens)
    wanted = (batch.input_ids.shape[0], bench.settings.new_tokens)
    if tokens.shape != wanted:  # a shorter answer would be a faster one
        raise RuntimeError(f"{method.name} must generate {wanted} tokens, got {tuple(tokens.shape)}")
    return tokens


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    gc.collect()
    machine.sync(device)
    start = time.perf_counter()
    work()
    machine.sync(device)
    return time.perf_counter() - start


def _measure_memory(bench: Bench, batch: Batch, work: Callable[[], None]) -> MemoryReport:
    """The memory pass, which is also the warm-up.

    On CUDA the total is what the caching allocator had handed out at most, kernels' scratch and rounding
    included, less the inputs; it comes from a pass without the tracker, under which autograd allocates a
    little more. The part above the static one is the tracker's on every device: the allocator does not know
    what a block belongs to.
    """
    device = bench.settings.device
    # The last step's gradients would be freed by this one's zero_grad anyway; without them both methods start
    # alike.
    bench.model.zero_grad(set_to_none=True)
    bench.connector.zero_grad(set_to_none=True)
    with AllocationTracker(static=bench.static(), device=device.type) as tracker:
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


def _meta(options: Options, settings: Settings, bench: Bench, audio_file: str) -> dict[str, Any]:
    cuda = settings.device.type == "cuda"
    gpu = torch.cuda.get_device_name(settings.device) if cuda else None
    versions = {name: machine.package_version(name) for name in ("palkernels", "torch", "triton", "transformers")}
    return {
        "device": str(settings.device),
        "device_name": gpu or machine.cpu_name(),
        "processor": machine.cpu_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": settings.llm.name,
        "layers": settings.llm.layers,
        "full_layers": settings.llm.full_layers,
        "llm_weights": bench.llm_weights,
        "encoder": f"whisper-{bench.encoder_size}",
        "encoder_weights": bench.encoder_weights,
        "connector": f"MLP, random (seed {settings.seed})",
        "audio_file": audio_file,
        "text_tokens": settings.text_tokens,
        "new_tokens": settings.new_tokens,
        "train_batch": settings.batch["train"],
        "infer_batch": settings.batch["infer"],
        "dtype": settings.dtype_name,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "optimizer": f"fused AdamW, learning rate {LEARNING_RATE}",
        "above_static_source": "tracked tensor allocations",
        "reductions": reductions(options, settings),
        "options": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(options).items()
            if key != "out"
        },
    }
