"""Whole audio LLMs on clips that fill a part of the encoder's window: what a training step costs from the clip's
spectrogram on.

An encoder gives as many states for a clip of a second as for its whole window of 30 s, and only the first of them are
valid. PLITS has a token for each valid state. What enters as keys and values must leave the others out as well: before
the connector, before every layer's projections, and in attention.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from palkernels.bench.experiments.measure import COMPARED, Bench
from palkernels.bench.experiments.optimizer import make_adamw
from palkernels.bench.instruments.timing import wall_seconds
from palkernels.bench.methods.base import IGNORED_LABEL
from palkernels.bench.report.document import Row
from palkernels.model import PalForConditionalGeneration
from palkernels.model.causal_lm.attached import handle_of

__all__ = ["measure_short_clips"]


@dataclass
class _Series:
    """One way of letting audio in, while it is measured."""

    model: Any
    samples: list[float] = field(default_factory=list)  # samples per second
    processor: list[float] = field(default_factory=list)  # seconds of all cores per sample


def measure_short_clips(bench: Bench, seconds: float) -> list[Row]:
    """Return a row for PLITS and one for LAL: training steps with a batch of clips of `seconds`, the encoder included.

    Args:
        bench: What the measurements share. Its language model is left as it was, its encoder is moved to the model's
            device and dtype; its clip is repeated to the length.
        seconds: Length of the clips, at most the encoder's window.
    """
    settings, text, encoder = bench.settings, bench.settings.text_tokens, bench.encoder
    batch, device = settings.batch["train"], settings.device
    placeholder = bench.vocab_size - 1
    count = round(seconds * encoder.sampling_rate)
    clip = bench.waveform[torch.arange(count) % bench.waveform.numel()]
    features, lengths = encoder.features([clip] * batch)
    valid = int(lengths[0])
    ids = torch.randint(placeholder, (batch, text), generator=torch.Generator().manual_seed(settings.seed))
    labels = ids.clone()
    labels[:, 0] = IGNORED_LABEL
    series: dict[str, _Series] = {}
    try:
        for name in COMPARED:  # named as the integrations are
            series[name] = _Series(_whole_model(bench, name, placeholder))
        # Both models have the language model's parameters; a connector whose turn it is not has no gradient.
        trained = (p for current in series.values() for p in current.model.parameters() if p.requires_grad)
        optimizer = make_adamw(list(dict.fromkeys(trained)))
        for turn in range(settings.repeats["train"] + 1):
            for name, current in series.items():
                before = valid if name == "plits" else 0
                arguments = {
                    "input_ids": torch.cat([ids.new_full((batch, before), placeholder), ids], dim=1),
                    "labels": torch.cat([labels.new_full((batch, before), IGNORED_LABEL), labels], dim=1),
                    "input_features": features.to(settings.dtype),
                    "audio_lengths": lengths,
                }
                arguments = {key: tensor.to(device) for key, tensor in arguments.items()}
                wall, processor = _timed(lambda: _step(current.model, optimizer, arguments), device)  # noqa: B023
                if turn:  # the first is the warm-up
                    current.samples.append(batch / wall)
                    current.processor.append(processor / batch)
    finally:
        handle = handle_of(bench.model)
        if handle is not None:
            handle.detach()
    return [
        {
            "method": name,
            "seconds": seconds,
            "audio_tokens": valid,
            "window_tokens": encoder.features.num_states,
            "text_tokens": text,
            "batch_size": batch,
            "dtype": settings.dtype_name,
            "samples_per_second": {"p50": statistics.median(current.samples), "samples": current.samples},
            "processor_seconds_per_sample": statistics.median(current.processor) if device.type == "cpu" else None,
            "status": "ok",
        }
        for name, current in series.items()
    ]


def _whole_model(bench: Bench, integration: str, placeholder: int) -> Any:
    entry = {"type": "whisper", "integration": integration, "connector": {"type": "mlp"}}
    towers = [bench.encoder]
    model = PalForConditionalGeneration.from_parts(bench.model, [entry], towers=towers, audio_token_id=placeholder)
    return model.train()


def _step(model: Any, optimizer: torch.optim.Optimizer, arguments: dict[str, Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    model(**arguments, use_cache=False).loss.backward()
    optimizer.step()


def _timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the seconds of one pass by the clock, and those of all cores together."""
    start = time.process_time()
    wall = wall_seconds(work, device)
    return wall, time.process_time() - start
