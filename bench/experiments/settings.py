"""From the command line to what is measured: options checked, and what was left open chosen for the device."""

from __future__ import annotations

import datetime
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from palkernels.bench import machine
from palkernels.bench.errors import UserError
from palkernels.bench.methods import METHODS, Method
from palkernels.bench.options import check_counts, check_text_tokens, dtype_name, parse_device, parse_dtype
from palkernels.bench.presets import LlmPlan, plan_llm
from palkernels.bench.report.roles import BASELINE, OURS

__all__ = [
    "Options", "Settings", "check_length", "check_methods", "fit_time", "reductions", "run_conditions", "settle",
]  # fmt: skip

LEAST_SECONDS, WINDOW_SECONDS = 0.1, 30.0  # of a clip for Whisper
PACKAGES = ("palkernels", "torch", "triton", "transformers", "liger-kernel")


@dataclass(frozen=True)
class Options:
    """The command line of `figure1`. None: chosen for the device by `settle`."""

    audio: Path | None = None
    model: str | None = None
    layers: int | None = None
    audio_tokens: tuple[int, ...] | None = None
    text_tokens: int = 128
    train_batch: int | None = None
    infer_batch: int | None = None
    new_tokens: int | None = None
    methods: tuple[str, ...] | None = None
    device: str = "auto"
    dtype: str = "auto"
    repeats: int | None = None
    out: Path = Path("figure1-out")
    seed: int = 0
    encoder_checkpoint: Path | None = None
    encoder_size: str = "tiny"
    serving: bool | None = None
    clip_seconds: tuple[float, ...] | None = None
    compiled: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Defaults:
    """What is measured on a kind of device where the options leave it open; `batch` and `repeats` by mode."""

    model: str
    audio_tokens: tuple[int, ...]
    batch: dict[str, int]
    new_tokens: int
    repeats: dict[str, int]
    methods: tuple[str, ...]
    clip_seconds: tuple[float, ...]


GPU_DEFAULTS = Defaults(
    "llama-3.2-1b", (128, 512, 1500), {"train": 8, "infer": 12}, 32, {"train": 10, "infer": 10}, tuple(METHODS),
    (0.8, 3.0, 30.0),
)  # fmt: skip
# On a CPU a small LLM runs whole, and audio, batches and repeats shrink so that a run takes minutes on two cores. The
# training batch is 2: at 1 the gradients of the tied embedding, which every method has, can weigh more than all that
# PLITS adds, and the total peaks are equal.
CPU_DEFAULTS = Defaults(
    "smollm2-135m", (128, 256, 512), {"train": 2, "infer": 2}, 8, {"train": 2, "infer": 5}, (BASELINE, OURS), (0.8, 3.0)
)
CPU_LAYERS = 2  # of any other model
# The repeats shrink too if the run would take more seconds than this, as it does on two cores.
CPU_SECONDS = 90
CPU_FEWEST_REPEATS = {"train": 1, "infer": 3}


@dataclass(frozen=True)
class Settings:
    """What is measured, with nothing left open."""

    llm: LlmPlan
    audio_tokens: tuple[int, ...]
    text_tokens: int
    batch: dict[str, int]  # by mode
    new_tokens: int
    methods: tuple[Method, ...]
    device: torch.device
    dtype: torch.dtype
    repeats: dict[str, int]  # by mode
    seed: int
    serving: bool
    clip_seconds: tuple[float, ...]  # of clips that fill a part of the encoder's window
    compiled: bool  # generation with compiled steps, too

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)


def settle(options: Options) -> Settings:
    """Check the options and fill in what was left open.

    Raises:
        UserError: an option is not usable; the message names it.
    """
    _check(options)
    device = parse_device(options.device)
    on_cpu = device.type == "cpu"
    defaults = CPU_DEFAULTS if on_cpu else GPU_DEFAULTS
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if not on_cpu or machine.cpu_has_bf16() else "fp32"
    llm = plan_llm(options.model or defaults.model, options.layers)
    if on_cpu and options.layers is None and llm.name != CPU_DEFAULTS.model and llm.full_layers > CPU_LAYERS:
        llm = plan_llm(llm.name, CPU_LAYERS)
    settings = Settings(
        llm=llm,
        audio_tokens=options.audio_tokens or defaults.audio_tokens,
        text_tokens=options.text_tokens,
        batch={
            "train": options.train_batch or defaults.batch["train"],
            "infer": options.infer_batch or defaults.batch["infer"],
        },
        new_tokens=options.new_tokens or defaults.new_tokens,
        methods=tuple(METHODS[name] for name in options.methods or defaults.methods),
        device=device,
        dtype=parse_dtype(dtype),
        repeats={mode: options.repeats or number for mode, number in defaults.repeats.items()},
        seed=options.seed,
        serving=not on_cpu if options.serving is None else options.serving,
        clip_seconds=defaults.clip_seconds if options.clip_seconds is None else options.clip_seconds,
        compiled=options.compiled,
    )
    check_length(llm, max(settings.audio_tokens) + options.text_tokens + settings.new_tokens)
    return settings


def fit_time(options: Options, settings: Settings, seconds: float) -> Settings:
    """Return the settings, with fewer repeats if the user left them open and a run on a CPU would take so many
    `seconds` that it is too long."""
    if settings.device.type != "cpu" or options.repeats is not None or seconds <= CPU_SECONDS:
        return settings
    return replace(settings, repeats=CPU_FEWEST_REPEATS)


def reductions(options: Options, settings: Settings) -> str:
    """Say what the defaults cut on a CPU, against what a run on a GPU takes by default; "" if nothing."""
    if settings.device.type != "cpu":
        return ""
    full, cut = GPU_DEFAULTS, []
    if options.model is None:
        cut.append(f"{settings.llm.name} instead of {full.model}")
    if options.layers is None and settings.llm.layers < settings.llm.full_layers:
        cut.append(f"{settings.llm.layers} of {settings.llm.full_layers} layers")
    if options.train_batch is None:
        cut.append(f"training batch {settings.batch['train']} instead of {full.batch['train']}")
    if options.infer_batch is None:
        cut.append(f"inference batch {settings.batch['infer']} instead of {full.batch['infer']}")
    if options.new_tokens is None:
        cut.append(f"{settings.new_tokens} new tokens instead of {full.new_tokens}")
    if options.audio_tokens is None:
        cut.append(f"at most {max(settings.audio_tokens)} audio tokens instead of {max(full.audio_tokens)}")
    if options.repeats is None:
        train, infer = settings.repeats["train"], settings.repeats["infer"]
        cut.append(f"{train} training and {infer} inference repeats instead of {full.repeats['train']}")
    if not cut:
        return ""
    return f"On a CPU the defaults are reduced: {', '.join(cut)}. Widths and vocabulary are the model's own."


def run_conditions(llm: LlmPlan) -> dict[str, Any]:
    """Return the conditions that measured and simulated results name alike: versions, date and model."""
    versions = {name: machine.package_version(name) for name in PACKAGES}
    return {
        "versions": {**versions, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": llm.name,
        "layers": llm.layers,
        "full_layers": llm.full_layers,
    }


def _check(options: Options) -> None:
    for name in ("layers", "text_tokens", "train_batch", "infer_batch", "new_tokens", "repeats"):
        count = getattr(options, name)
        if count is not None:
            check_counts(name, (count,))
    if options.audio_tokens is not None:
        check_counts("audio_tokens", options.audio_tokens)
    check_text_tokens((options.text_tokens,))
    if options.methods is not None:
        check_methods(options.methods)
    if not all(LEAST_SECONDS <= seconds <= WINDOW_SECONDS for seconds in options.clip_seconds or ()):
        raise UserError(
            f"--clip-seconds must be from {LEAST_SECONDS} to {WINDOW_SECONDS:g}, Whisper's window, or none, "
            f"got {', '.join(f'{x:g}' for x in options.clip_seconds or ())}"
        )
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    if options.dtype != "auto":
        parse_dtype(options.dtype)


def check_methods(names: tuple[str, ...]) -> None:
    """Check the names that `--methods` was given.

    Raises:
        UserError: there are none, two are equal, or one is unknown.
    """
    if not names or not set(names) <= set(METHODS) or len(set(names)) < len(names):
        raise UserError(f"--methods must be distinct names out of {', '.join(METHODS)}, got {', '.join(names)!r}")


def check_length(llm: LlmPlan, longest: int, sweep: str = "") -> None:
    """Check the number of audio, text and new tokens of a sample together. `sweep` names the option whose own numbers
    they are; the message says how to leave it out.

    Raises:
        UserError: the model has fewer positions.
    """
    most = getattr(llm.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        tokens = "audio, text and new tokens together"
        source = f" for --{sweep}. --no-{sweep} leaves them out" if sweep else ""
        raise UserError(f"{tokens} must be at most {most} for {llm.name}, got {longest}{source}")
