"""`palkernels simulate`: what Figure 1 costs at full size on a GPU, predicted without one.

Each point is one run in a model without values (`valueless`). All LLM weights train; the encoder is left out. This
library's functions take their Triton path. Throughput is given twice: where each step is a captured CUDA graph, and in
eager mode, where the host launches every kernel and is often the slower one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.experiments.measure import COMPARED, SERVING
from palkernels.bench.experiments.settings import check_length, check_methods, run_conditions
from palkernels.bench.experiments.valueless import ENCODER_WIDTH, ValuelessModel
from palkernels.bench.instruments.rates import GPUS, HOST
from palkernels.bench.methods import METHODS, MODES, Method
from palkernels.bench.options import check_counts, check_text_tokens, dtype_name
from palkernels.bench.presets import LlmPlan, plan_llm
from palkernels.bench.report import document as results
from palkernels.bench.report import files, fits
from palkernels.bench.report.points import EAGER_RATE, RATE, add_errors
from palkernels.bench.report.serving import SERVING_FIGURES, serving_row
from palkernels.bench.report.terminal import print_points

__all__ = ["FILES", "LENGTHS", "OPTIMIZERS", "Options", "run", "simulate"]

FILES = ("simulate.json", "simulate.csv", "simulate.png", "simulate.html")
OPTIMIZERS = ("none", "adamw")
DTYPES = {"train": torch.bfloat16, "infer": torch.float16}
# The cost against length: one of the three varies, the others are as in FIXED.
LENGTHS = {
    "audio_tokens": (64, 256, 1024, 2048, 4096, 6000),
    "text_tokens": (32, 128, 512, 1024),
    "batch_size": (1, 4, 16),
}
FIXED = {"audio_tokens": 1500, "text_tokens": 128, "batch_size": 8}


@dataclass(frozen=True)
class Options:
    """The command line of `simulate`."""

    model: str = "llama-3.2-1b"
    layers: int | None = None
    methods: tuple[str, ...] = tuple(METHODS)
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
        if measured is not None and not add_errors(document["rows"], measured):
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
            sum((FIXED | {varies: max(counts)})[name] for name in ("audio_tokens", "text_tokens"))
            for varies, counts in LENGTHS.items()
        ]
        check_length(llm, max(longest) + 1, "lengths")
    if options.serving:
        needed = FIXED["audio_tokens"] + FIXED["text_tokens"] + options.new_tokens
        check_length(llm, needed, "serving")
    return llm


def simulate(options: Options, llm: LlmPlan, console: Console) -> dict[str, Any]:
    """Return the document that simulate.json holds."""
    try:
        models = {mode: ValuelessModel(llm, dtype) for mode, dtype in DTYPES.items()}
        for name in options.methods:
            with models["train"].ready(METHODS[name]):  # a model that a method cannot take is known before the sweep
                pass
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    sections: dict[str, list[Callable[[], list[results.Row]]]] = {
        "rows": _points(options, models),
        "lengths": _lengths(options, models) if options.lengths else [],
        "serving": _serving(options, models["infer"], llm) if options.serving else [],
    }
    rows: dict[str, list[results.Row]] = {name: [] for name in sections}
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task(llm.name, total=sum(map(len, sections.values())))
        for name, points in sections.items():
            for simulate_point in points:
                rows[name] += simulate_point()
                progress.advance(task)
    exponents = fits.exponents(rows["lengths"])
    return {"meta": _meta(options, llm), **rows, "exponents": exponents}


def _points(options: Options, models: dict[str, ValuelessModel]) -> list[Callable[[], list[results.Row]]]:
    """Return a call for each point of Figure 1, which returns its rows."""
    return [
        partial(_rows, options, models[mode], METHODS[name], mode, audio, text, batch_size)
        for mode, batch_size in (("train", options.train_batch), ("infer", options.infer_batch))
        for text in options.text_tokens
        for audio in options.audio_tokens
        for name in options.methods
        if mode in METHODS[name].modes
    ]


def _lengths(options: Options, models: dict[str, ValuelessModel]) -> list[Callable[[], list[results.Row]]]:
    """Return a call for each training step as one size varies, and for each prefill as the audio does."""

    def simulate_point(mode: str, name: str, varies: str, count: int) -> list[results.Row]:
        sizes = FIXED | {varies: count}
        prefill = replace(options, new_tokens=1)
        numbers = (sizes["audio_tokens"], sizes["text_tokens"], sizes["batch_size"])
        rows = _rows(prefill, models[mode], METHODS[name], mode, *numbers)
        return [{**row, "mode": "train" if mode == "train" else "prefill", "varies": varies} for row in rows]

    return [
        partial(simulate_point, mode, name, varies, count)
        for mode in MODES
        for varies, counts in LENGTHS.items()
        if mode == "train" or varies == "audio_tokens"
        for count in counts
        for name in COMPARED
    ]


def _rows(
    options: Options, model: ValuelessModel, method: Method, mode: str, audio: int, text: int, batch_size: int
) -> list[results.Row]:
    """Simulate one method at one point and return a row for each GPU."""
    if mode == "train":
        simulated = model.train(method, audio, text, batch_size, options.optimizer)
    else:
        simulated = model.infer(method, audio, text, batch_size, options.new_tokens)
    costs, rows = simulated.costs, []
    for key, gpu in GPUS.items():
        rate = batch_size / sum(simulated.captured_seconds(key))
        rows.append(
            {
                "method": method.name,
                "mode": mode,
                "audio_tokens": audio,
                "text_tokens": text,
                "batch_size": batch_size,
                "dtype": dtype_name(model.dtype),
                "impl": simulated.impl,
                RATE: {"p50": rate, "samples": [rate]},
                EAGER_RATE: batch_size / sum(simulated.eager_seconds(key)),
                "peak_memory_bytes": simulated.peak_bytes,
                "peak_above_static_bytes": simulated.peak_above_static_bytes,
                "memory_source": "tracked tensor allocations, without values",
                "source": "simulated",
                "status": "ok",
                "device": gpu.name,
                "memory_breakdown": simulated.memory_breakdown,
                "attention_flops": round(costs["attention_flops"]),
                "other_flops": round(costs["other_flops"]),
                "traffic_bytes": round(costs["bytes"]),
                "kernels": costs["kernels"],
                "our_kernels": costs["our_kernels"],
                "host_seconds": simulated.host_seconds,
            }
        )
    return rows


def _serving(options: Options, model: ValuelessModel, llm: LlmPlan) -> list[Callable[[], list[results.Row]]]:
    """Return a call for each number of clips with questions about them, answered in one batch."""

    def simulate_point(name: str, clips: int, questions: int) -> list[results.Row]:
        method, new = METHODS[name], options.new_tokens
        simulated = model.infer(method, FIXED["audio_tokens"], FIXED["text_tokens"], questions, new, clips)
        rows = []
        for key, gpu in GPUS.items():
            captured, eager = (
                serving_row(method, llm.config, model.dtype, clips, questions, FIXED, new, first, sum(rest))
                for first, *rest in (simulated.captured_seconds(key), simulated.eager_seconds(key))
            )
            row = captured | {f"eager_{figure}": eager[figure] for figure in SERVING_FIGURES}
            rows.append({**row, "peak_memory_bytes": simulated.peak_bytes, "source": "simulated", "device": gpu.name})
        return rows

    return [partial(simulate_point, name, *point) for point in SERVING for name in COMPARED]


def _meta(options: Options, llm: LlmPlan) -> dict[str, Any]:
    names = {mode: dtype_name(dtype) for mode, dtype in DTYPES.items()}
    return {
        "source": "simulated",
        "gpus": {
            gpu.name: {
                **asdict(gpu.published),
                "share_of_flops": gpu.SHARE_OF_FLOPS,
                "share_of_bytes": gpu.SHARE_OF_BYTES,
            }
            for gpu in GPUS.values()
        },
        "host_seconds_per_kernel": asdict(HOST),
        **run_conditions(llm),
        "text_tokens": options.text_tokens[0],
        "new_tokens": options.new_tokens,
        "train_batch": options.train_batch,
        "infer_batch": options.infer_batch,
        "dtype": f"{names['train']} in training, {names['infer']} in inference",
        "optimizer": options.optimizer,
        "connector": f"MLP from {ENCODER_WIDTH}",
        "options": results.recorded(options),
    }
