"""What `palkernels bench-serving` is told, and what must hold of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from palkernels.bench.errors import UserError
from palkernels.bench.options import check_counts

__all__ = ["Options", "Point", "check", "default_model", "default_seed", "points"]

FIXED = ("--model", "--host", "--port", "--dtype", "--served-model-name", "--api-key")  # of a server, not to be given


@dataclass(frozen=True)
class Options:
    """What is served and how it is loaded. See the command's help."""

    models: tuple[str, ...]
    questions: tuple[int, ...]
    concurrency: tuple[int, ...]
    requests: int
    seconds: float
    characters: int
    new_tokens: int
    encoder: str
    dtype: str
    seed: int
    start_seconds: float
    out: Path
    serve: tuple[str, ...] = ()
    url: str | None = None  # of a server that runs already, which is loaded instead


@dataclass(frozen=True)
class Point:
    """A load: questions asked about each clip, and requests that are in flight together."""

    questions: int
    concurrency: int


def default_model() -> str:
    """Return the preset that this machine serves if none is named."""
    return "llama-3.2-1b" if torch.cuda.is_available() else "smollm2-135m"


def default_seed(url: str | None) -> int:
    """Return the seed of a run that names none: a server that runs already may know the clips of an earlier one."""
    return 0 if url is None else secrets.randbelow(2**31)


def check(options: Options) -> None:
    """Check what needs no model.

    Raises:
        UserError: an option is out of bounds, or one of the server's is the command's own.
    """
    for name in ("questions", "concurrency"):
        check_counts(name, getattr(options, name))
    for name, least in (("requests", 1), ("characters", 1), ("new_tokens", 2)):
        if (count := getattr(options, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {count}")
    if options.requests < (most := max(*options.questions, *options.concurrency)):
        raise UserError(
            f"--requests must be at least the most questions of a clip and requests in flight, {most}, "
            f"got {options.requests}"
        )
    if uneven := [count for count in options.questions if options.requests % count]:
        raise UserError(f"--requests must be a multiple of every number of --questions, got {uneven[0]}")
    if not 0.1 <= options.seconds <= 600:
        raise UserError(f"--seconds must be from 0.1 to 600, which is vLLM's own limit, got {options.seconds:g}")
    if options.url is not None and (options.models or options.serve):
        raise UserError("--serve must come without --model and options of a server, as it is of one that runs already")
    for word in options.serve:
        if (name := word.partition("=")[0].replace("_", "-")) in FIXED:
            raise UserError(f"options of the server must not have {name}, which the command sets, got {word!r}")


def points(options: Options) -> Iterator[Point]:
    """Yield every load."""
    for concurrency in options.concurrency:
        for questions in options.questions:
            yield Point(questions, concurrency)
