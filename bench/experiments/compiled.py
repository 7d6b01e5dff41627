"""Generation with a static cache, whose steps transformers compiles, beside generation as it comes.

On a GPU each compiled step is one CUDA graph, so that the host launches one thing where it launched hundreds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.utils
from transformers import CompileConfig

from palkernels.bench.experiments.measure import COMPARED, Bench, infer
from palkernels.bench.instruments.timing import wall_seconds
from palkernels.bench.methods import METHODS, Batch, Method
from palkernels.bench.report.document import Row

__all__ = ["measure_compiled"]

WARM_UP = 2  # the first call compiles, the second captures


def measure_compiled(bench: Bench, count: int) -> list[Row]:
    """Return a row for each method in COMPARED at one number of audio tokens: samples per second of generation, the
    prompt included, as it comes and compiled.

    Each method has its turn by itself: another one would have the model compiled again.
    """
    settings, device = bench.settings, bench.settings.device
    size = settings.batch["infer"]
    batch = Batch.make(bench.clips[count], size, settings.text_tokens, bench.vocab_size, settings.seed)
    rows = []
    for method in (METHODS[name] for name in COMPARED):

        def generate(method: Method = method) -> None:
            infer(bench, method, batch)

        with method.ready(bench.model) as impl:
            _, eager = _timed(generate, 1, settings.repeats["infer"], device)
            with _compiled_steps(bench.model, device):
                warm_up, _ = _timed(generate, WARM_UP, 0, device)
                graphs = _graphs()
                _, compiled = _timed(generate, 0, settings.repeats["infer"], device)
                again = _graphs() - graphs
        rows.append(
            {
                "method": method.name,
                "audio_tokens": count,
                "text_tokens": settings.text_tokens,
                "new_tokens": settings.new_tokens,
                "batch_size": size,
                "dtype": settings.dtype_name,
                "impl": impl,
                "samples_per_second": _rates(eager, size),
                "compiled_samples_per_second": _rates(compiled, size),
                "warm_up_seconds": warm_up,
                "graphs": graphs,
                "status": f"compiled {again} times while timed" if again else "ok",
            }
        )
    return rows


@contextmanager
def _compiled_steps(model: Any, device: torch.device) -> Iterator[None]:
    """Let generate compile its steps, anew."""
    settings = model.generation_config
    before = settings.cache_implementation, settings.compile_config
    settings.cache_implementation = "static"
    if device.type == "cpu":  # where transformers compiles only if it is told to
        settings.compile_config = CompileConfig(mode=None)
        settings.compile_config._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        yield
    finally:
        settings.cache_implementation, settings.compile_config = before
        torch.compiler.reset()


def _graphs() -> int:
    """Return how many graphs have been compiled since the last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _timed(
    work: Callable[[], None], warm_up: int, repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Return the seconds of the calls that warm up, and of those that count."""
    seconds = [wall_seconds(work, device) for _ in range(warm_up + repeats)]
    return seconds[:warm_up], seconds[warm_up:]


def _rates(seconds: list[float], size: int) -> dict[str, Any]:
    samples = [size / x for x in seconds]
    return {"p50": statistics.median(samples), "samples": samples}
