"""From the command line to what is measured: options checked, and what was left open chosen for the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from palkernels.bench import machine
from palkernels.bench.errors import UserError
from palkernels.bench.methods.methods import METHODS, Method
from palkernels.bench.presets import LlmPlan, plan_llm

__all__ = [
    "Options", "Settings", "check_counts", "check_length", "check_methods", "check_text_tokens", "dtype_name",
    "fit_time", "parse_device", "parse_dtype", "reductions", "settle",
]  # fmt: skip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}  # PyTorch's names do too


@dataclass(frozen=True)
class Options:
    """The command line. None: chosen for the device by `settle`."""

    audio: Path | None = None
    model: str = "llama-3.2-1b"
    layers: int | None = None
    audio_tokens: tuple[int, ...] = (128, 512, 1500)
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
    resume: bool = False


@dataclass(frozen=True)
class Defaults:
    """What depends on the device; `batch` and `repeats` by mode."""

    batch: dict[str, int]
    new_tokens: int
    repeats: dict[str, int]
    methods: tuple[str, ...]


GPU_DEFAULTS = Defaults({"train": 8, "infer": 12}, 32, {"train": 10, "infer": 10}, tuple(METHODS))
# On a CPU the widths and the vocabulary stay true, and depth, batches and repeats shrink to fit a few minutes. The
# batch is 2: at 1 the gradients of the tied embedding, which every method has, weigh more than all that PLITS adds at
# 512 audio tokens, and the total peaks are equal. In float32, with those gradients twice as large, they still are.
CPU_DEFAULTS = Defaults({"train": 2, "infer": 2}, 8, {"train": 2, "infer": 5}, ("plits", "lal"))
CPU_LAYERS = 2
MOST = 10**9  # of any count on the command line
# On slow processors the repeats shrink too, if the run would take longer than this.
CPU_SECONDS = 300
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
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if not on_cpu or machine.cpu_has_bf16() else "fp32"
    llm = plan_llm(options.model, options.layers)
    if on_cpu and options.layers is None and llm.full_layers > CPU_LAYERS:
        llm = plan_llm(options.model, CPU_LAYERS)
    defaults = CPU_DEFAULTS if on_cpu else GPU_DEFAULTS
    settings = Settings(
        llm=llm,
        audio_tokens=options.audio_tokens,
        text_tokens=options.text_tokens,
        batch={
            "train": options.train_batch or defaults.batch["train"],
            "infer": options.infer_batch or defaults.batch["infer"],
        },
        new_tokens=options.new_tokens or defaults.new_tokens,
        methods=tuple(METHODS[name] for name in options.methods or defaults.methods),
        device=device,
        dtype=DTYPES[dtype],
        repeats={mode: options.repeats or number for mode, number in defaults.repeats.items()},
        seed=options.seed,
        serving=not on_cpu if options.serving is None else options.serving,
    )
    check_length(llm, max(options.audio_tokens) + options.text_tokens + settings.new_tokens)
    return settings


def fit_time(options: Options, settings: Settings, seconds: float) -> Settings:
    """Fewer repeats for a run on a CPU that would take `seconds`, if that is long and the user left them open."""
    if settings.device.type != "cpu" or options.repeats is not None or seconds <= CPU_SECONDS:
        return settings
    return replace(settings, repeats=CPU_FEWEST_REPEATS)


def reductions(options: Options, settings: Settings) -> str:
    """What the defaults cut on a CPU, against what a run on a GPU takes by default; "" if nothing."""
    if settings.device.type != "cpu":
        return ""
    full, cut = GPU_DEFAULTS, []
    if options.layers is None and settings.llm.layers < settings.llm.full_layers:
        cut.append(f"{settings.llm.layers} of {settings.llm.full_layers} layers")
    if options.train_batch is None:
        cut.append(f"training batch {settings.batch['train']} instead of {full.batch['train']}")
    if options.infer_batch is None:
        cut.append(f"inference batch {settings.batch['infer']} instead of {full.batch['infer']}")
    if options.new_tokens is None:
        cut.append(f"{settings.new_tokens} new tokens instead of {full.new_tokens}")
    if options.repeats is None:
        train, infer = settings.repeats["train"], settings.repeats["infer"]
        cut.append(f"{train} training and {infer} inference repeats instead of {full.repeats['train']}")
    if not cut:
        return ""
    return f"On a CPU the defaults are reduced: {', '.join(cut)}. Widths and vocabulary are the model's own."


def _check(options: Options) -> None:
    for name in ("layers", "text_tokens", "train_batch", "infer_batch", "new_tokens", "repeats"):
        value = getattr(options, name)
        if value is not None:
            check_counts(name, (value,))
    check_counts("audio_tokens", options.audio_tokens)
    check_text_tokens((options.text_tokens,))
    if options.methods is not None:
        check_methods(options.methods)
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    if options.dtype != "auto":
        parse_dtype(options.dtype)


def check_counts(name: str, counts: tuple[int, ...]) -> None:
    """`--NAME`.

    Raises:
        UserError: they are not distinct, or out of bounds.
    """
    if not counts or min(counts) < 1 or max(counts) > MOST or len(set(counts)) < len(counts):
        got = ", ".join(map(str, counts))
        what = "" if len(counts) == 1 else "distinct counts of "
        raise UserError(f"--{name.replace('_', '-')} must be {what}at least 1 and at most {MOST}, got {got}")


def check_text_tokens(counts: tuple[int, ...]) -> None:
    """`--text-tokens`.

    Raises:
        UserError: they are not distinct, out of bounds or too few.
    """
    check_counts("text_tokens", counts)
    if min(counts) < 2:
        raise UserError(f"--text-tokens must be at least 2 for a next token to be predicted, got {min(counts)}")


def check_methods(names: tuple[str, ...]) -> None:
    """`--methods`.

    Raises:
        UserError: they are not distinct, or unknown.
    """
    if not names or not set(names) <= set(METHODS) or len(set(names)) < len(names):
        raise UserError(f"--methods must be distinct names out of {', '.join(METHODS)}, got {', '.join(names)!r}")


def check_length(llm: LlmPlan, longest: int, of: str = "") -> None:
    """Audio, text and new tokens of a row together; `of` says what for, where the user did not.

    Raises:
        UserError: they are more than the model has positions.
    """
    most = getattr(llm.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise UserError(f"{of}audio, text and new tokens together must be at most {most} for {llm.name}, got {longest}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse_device(name: str) -> torch.device:
    """`--device`.

    Raises:
        UserError: it is no device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:INDEX, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device must exist on this machine, got {name!r} and {torch.cuda.device_count()} GPUs")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """`--dtype`, where it is not auto.

    Raises:
        UserError: it is none of those that are measured.
    """
    if name not in DTYPES:
        raise UserError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
