"""Figure 1 of the paper on this machine: memory and throughput of PLITS and LAL against the number of audio tokens.

One encoder, one connector and one language model serve every method. For each number of audio tokens it measures

- train: one full step (zero_grad, connector, forward, backward, fused AdamW); all LLM weights and the connector train;
- infer: the prefill and a fixed number of greedily decoded tokens.

The encoder runs once beforehand and counts in neither time nor memory; the connector counts in both. The first pass of
each method is the warm-up and the memory pass; then the methods take turns (A B A B ...), so that a drift of the
machine hits all of them. A point that does not fit into memory is recorded as such and the sweep goes on.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from palkernels.bench import machine
from palkernels.bench.clip import bundled_clip
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.experiments.compiled import measure_compiled
from palkernels.bench.experiments.measure import SERVING, Bench, measure_point, measure_serving
from palkernels.bench.experiments.optimizer import LEARNING_RATE
from palkernels.bench.experiments.settings import Options, Settings, fit_time, reductions, run_conditions, settle
from palkernels.bench.experiments.short_clips import measure_short_clips
from palkernels.bench.instruments import estimate
from palkernels.bench.instruments.rates import Rates, measure_rates
from palkernels.bench.methods import METHODS, MODES
from palkernels.bench.report import document as results
from palkernels.bench.report import files
from palkernels.bench.report.conditions import depth
from palkernels.bench.report.terminal import print_points
from palkernels.model.audio.files import load_audio
from palkernels.model.connectors.mlp import MlpConnector
from palkernels.model.encoders.whisper import WhisperAudioEncoder

__all__ = ["FILES", "Options", "run"]

FILES = ("figure1.json", "figure1.csv", "figure1.png", "figure1.html")
# What of a run's conditions may differ from those of the one that it continues.
FREE_TO_CHANGE = ("date", "complete", "repeats", "reductions")


def run(options: Options, console: Console) -> Path:
    """Measure, write the four files and return the plot's path.

    The JSON file is written after every point. A run that is interrupted writes all four for the points it has, and
    `options.resume` continues it.

    Raises:
        UserError: an option, the audio file, the model or the output folder is not usable, or there is nothing to
            resume.
    """
    settings = settle(options)
    before = results.read(options.out / FILES[0]) if options.resume else None
    with results.writable_folder(options.out, FILES):
        audio_file, waveform = _read_audio(options.audio)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # This also starts PyTorch's threads, whose stacks the memory limit would count otherwise.
        rates = measure_rates(settings.dtype, settings.device)
        limit = machine.memory_limit() if settings.device.type == "cpu" else nullcontext()
        with limit, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers renames what both of its versions have
            bench = _build(options, settings, waveform)
            settings = bench.settings = fit_time(options, settings, _total_seconds(bench, rates))
            document: dict[str, Any] = {"meta": _meta(options, settings, bench, audio_file), "rows": [], "serving": []}
            document |= {"compiled": [], "short_clips": []}
            if before is not None:
                settings = bench.settings = _resume(document, before, settings)
            _introduce(document["meta"], bench, rates, console)
            try:
                _sweep(bench, rates, console, document, options.out)
                document["meta"]["complete"] = True
            finally:
                if document["rows"]:
                    results.write_all(options.out, files.contents(document, FILES))
    print_points(document, console)
    return options.out / FILES[2]


def _resume(document: dict[str, Any], before: dict[str, Any], settings: Settings) -> Settings:
    """Take over the points of a run under the same conditions, and its repeats, which may depend on the time it took.

    Raises:
        UserError: the conditions differ; the message names those that do.
    """
    old, new = before["meta"], document["meta"]
    if not isinstance(old.get("options"), dict) or not isinstance(old.get("repeats"), dict):
        raise UserError("--resume must find a run of this version of figure1 in --out, got a file without its options")
    fixed = {key: value for key, value in new.items() if key not in FREE_TO_CHANGE}
    for was, now in ((old["options"], new["options"]), (old, fixed)):  # options first: others follow from them
        differ = [key for key in now if was.get(key) != now[key]]
        if differ:
            pairs = ", ".join(f"{key} {was.get(key)!r} and now {now[key]!r}" for key in differ)
            raise UserError(f"--resume must be given what the run in --out was given, got {pairs}")
    # A point counts if it has every method; the rest of a file that was cut or edited is measured again.
    wanted = {mode: {x.name for x in settings.methods if mode in x.modes} for mode in MODES}
    points: dict[tuple[str, int], list[results.Row]] = {}
    for row in before["rows"]:
        points.setdefault((row["mode"], row["audio_tokens"]), []).append(row)
    whole = [rows for (mode, _), rows in points.items() if {row["method"] for row in rows} == wanted.get(mode)]
    document |= {
        "rows": [row for rows in whole for row in rows],
        "serving": before.get("serving", []),
        "compiled": before.get("compiled", []),
        "short_clips": before.get("short_clips", []),
        "meta": {**old, "complete": False},
    }
    return replace(settings, repeats=old["repeats"])


def _read_audio(path: Path | None) -> tuple[str, Tensor]:
    """Return the audio file's name in results, and its samples at 16 kHz."""
    try:
        return str(path or "bundled clip"), load_audio(path or bundled_clip(), 16_000)
    except (ValueError, FileNotFoundError, ImportError) as error:  # AudioError is a ValueError
        raise UserError(one_line(error)) from error


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
            if method.why_not(settings.device) is None:
                with method.ready(llm.model):  # a model that a method cannot take is known before the sweep
                    pass
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        raise UserError(f"{settings.llm.name} must fit into memory, got too little: try fewer --layers") from error
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    digest = _digest(waveform.numpy().tobytes())
    bench = Bench(settings, llm.model, connector, clips, encoder.cpu(), waveform, llm.weights, digest)
    bench.parameters = [*llm.model.parameters(), *connector.parameters()]
    return bench


def _introduce(meta: dict[str, Any], bench: Bench, rates: Rates, console: Console) -> None:
    """Say what is measured, what was reduced to suit a CPU, and how long it will take."""
    lines = (
        f"{meta['model']}, {depth(meta)}, {meta['dtype']}, on {meta['device']}; LLM weights {meta['llm_weights']}",
        f"Whisper {bench.encoder.size}, encoder weights {meta['encoder_weights']}",
        meta["reductions"],
        f"Estimated time: {_duration(_total_seconds(bench, rates))}",
    )
    for line in filter(None, lines):
        _say(console, line)


def _say(console: Console, text: str) -> None:
    """Print a line, broken between words where the console is narrower."""
    lines = textwrap.wrap(text, console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _sweep(bench: Bench, rates: Rates, console: Console, document: dict[str, Any], out: Path) -> None:
    """Measure the points that the document lacks, and write it after each."""
    settings, expected = bench.settings, _expected_seconds(bench, rates)
    rows, serving = document["rows"], document["serving"]
    done = {(row["mode"], row["audio_tokens"]) for row in rows}
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task("", total=_total_seconds(bench, rates))
        for mode, count in expected:
            progress.update(task, description=f"{mode}, {count} audio tokens")
            if (mode, count) not in done:
                if mode == "infer":
                    bench.release_training()
                point = measure_point(bench, mode, count)
                rows += point
                results.write_all(out, {FILES[0]: results.json_text(document)})
                _say(progress.console, _point_line(mode, count, point))
            progress.advance(task, expected[mode, count])
        bench.release_training()
        served = {(row["clips"], row["questions"]) for row in serving}
        for clips, questions in SERVING if settings.serving else ():
            progress.update(task, description=f"{questions} questions about {clips} clips")
            if (clips, questions) not in served:
                serving += measure_serving(bench, clips, questions)
                _say(progress.console, f"serving, {questions} questions about {clips} clips: done")
                results.write_all(out, {FILES[0]: results.json_text(document)})
        compiled = document["compiled"]
        for count in settings.audio_tokens if settings.compiled else ():
            progress.update(task, description=f"compiled, {count} audio tokens")
            if count not in {row["audio_tokens"] for row in compiled}:
                compiled += measure_compiled(bench, count)
                _say(progress.console, f"compiled, {count} audio tokens: done")
                results.write_all(out, {FILES[0]: results.json_text(document)})
        bench.release_training()
        clips = document["short_clips"]
        for seconds, duration in _expected_of_clips(bench, rates).items():
            progress.update(task, description=f"clips of {seconds:g} s")
            if seconds not in {row["seconds"] for row in clips}:
                clips += measure_short_clips(bench, seconds)
                _say(progress.console, f"clips of {seconds:g} s: done")
                results.write_all(out, {FILES[0]: results.json_text(document)})
            progress.advance(task, duration)


def _expected_seconds(bench: Bench, rates: Rates) -> dict[tuple[str, int], float]:
    """Return the seconds of all passes of all methods, by mode and number of audio tokens in the order of the sweep."""
    settings = bench.settings
    config, text, on_gpu = settings.llm.config, settings.text_tokens, settings.device.type == "cuda"
    size = sum(p.nbytes for p in bench.parameters)
    expected = {}
    for mode in MODES:
        for count in settings.audio_tokens:
            total = 0.0
            for method in settings.methods:
                if mode not in method.modes or method.why_not(settings.device):
                    continue
                sample = estimate.Sample(method.in_sequence(count), method.as_keys(count), text, settings.batch[mode])
                if mode == "train":
                    seconds = estimate.train_seconds(config, rates, sample, method.with_logits(count, text), size)
                else:
                    seconds = estimate.infer_seconds(config, rates, sample, settings.new_tokens, size)
                if on_gpu:  # eager
                    seconds = max(seconds, estimate.host_seconds(config, mode, settings.new_tokens))
                total += seconds
            # And the memory pass. On a GPU it is two, one of them under the tracker, and kernels are compiled in it.
            expected[mode, count] = total * (settings.repeats[mode] + (5 if on_gpu else 1))
    return expected


def _total_seconds(bench: Bench, rates: Rates) -> float:
    return sum(_expected_seconds(bench, rates).values()) + sum(_expected_of_clips(bench, rates).values())


def _expected_of_clips(bench: Bench, rates: Rates) -> dict[float, float]:
    """Return the seconds of all passes with clips that fill a part of the window, by their length; the encoder's own
    are left out."""
    settings, expected = bench.settings, {}
    config, text, batch = settings.llm.config, settings.text_tokens, settings.batch["train"]
    for seconds in settings.clip_seconds:
        valid = bench.encoder.features.state_length(round(seconds * bench.encoder.sampling_rate))
        total = 0.0
        for sample, logits in (
            (estimate.Sample(valid, 0, text, batch), text + valid),
            (estimate.Sample(0, valid, text, batch), text),
        ):
            size = sum(p.nbytes for p in bench.parameters)
            total += estimate.train_seconds(config, rates, sample, logits, size)
        expected[seconds] = total * (settings.repeats["train"] + 1)
    return expected


def _duration(seconds: float) -> str:
    return f"about {math.ceil(seconds / 5) * 5} s" if seconds < 60 else f"about {math.ceil(seconds / 60)} min"


def _point_line(mode: str, count: int, rows: list[results.Row]) -> str:
    rates = []
    for row in rows:
        p50 = row["samples_per_second"]["p50"]
        rates.append(f"{METHODS[row['method']].label} {row['status'] if p50 is None else f'{p50:.3g} samples/s'}")
    return f"{mode}, {count} audio tokens: {', '.join(rates)}"


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def _meta(options: Options, settings: Settings, bench: Bench, audio_file: str) -> dict[str, Any]:
    cuda = settings.device.type == "cuda"
    gpu = torch.cuda.get_device_name(settings.device) if cuda else None
    return {
        "device": str(settings.device),
        "device_name": gpu or machine.cpu_name(),
        "processor": machine.cpu_name(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        **run_conditions(settings.llm),
        "llm_weights": bench.llm_weights,
        "encoder": f"whisper-{bench.encoder.size}",
        "encoder_weights": bench.encoder.weights,
        "connector": f"MLP, random (seed {settings.seed})",
        "audio_file": audio_file,
        "digests": {"model config": _digest(settings.llm.config.to_json_string()), "audio": bench.audio_digest},
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
        "options": {key: value for key, value in results.recorded(options).items() if key != "resume"},
        "complete": False,
    }
