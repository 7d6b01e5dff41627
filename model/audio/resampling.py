"""Sampling rates: torchaudio's windowed-sinc resampler, of a whole waveform or of one that comes in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from palkernels.model.audio.dependencies import import_audio_package
from palkernels.model.audio.limits import check_rates

__all__ = ["resample", "resample_blocks"]

# torchaudio's default low-pass filter, spelled out because resampling in blocks must know its reach.
FILTER_ZEROS = 6
FILTER_ROLLOFF = 0.99


def resample(waveform: Tensor, rate: int, sampling_rate: int) -> Tensor:
    """Convert a waveform (samples,) at `rate` Hz to `sampling_rate` Hz, float32 on the CPU.

    Raises:
        AudioError: A rate is beyond the limits, or the two have too small a common divisor.
        ModuleNotFoundError: The rates differ and torchaudio cannot be imported.
    """
    check_rates("audio", rate, sampling_rate)
    waveform = waveform.to("cpu", torch.float32)
    if rate == sampling_rate:
        return waveform
    return torch.as_tensor(_resampler(rate, sampling_rate)(waveform))


def resample_blocks(blocks: Iterator[Tensor], rate: int, sampling_rate: int) -> Iterator[Tensor]:
    """Convert a stream of float32 blocks (samples,) to what resampling all of it at once would give, block by block.

    Every `step_in` input samples give `step_out` output samples, and each output sample depends on the input up to
    `reach` samples to either side. So whole steps are emitted once their right context is there, and the left context
    of the next step is kept. Only the stream's two ends see zeros beyond the input.
    """
    resampler = _resampler(rate, sampling_rate)
    divisor = math.gcd(rate, sampling_rate)
    step_in, step_out = rate // divisor, sampling_rate // divisor
    reach = math.ceil(FILTER_ZEROS * step_in / (min(step_in, step_out) * FILTER_ROLLOFF))
    context = math.ceil(reach / step_in) * step_in

    pending = torch.empty(0, dtype=torch.float32, device="cpu")
    left = 0  # samples of left context at the start of `pending`, a multiple of step_in
    for block in blocks:
        pending = torch.cat([pending, block])
        ready = (pending.numel() - left - context) // step_in * step_in
        if ready <= 0:
            continue
        done = left + ready
        output = resampler(pending[: done + context])
        yield output[left // step_in * step_out : done // step_in * step_out]
        left = min(context, done)
        pending = pending[done - left :]
    yield resampler(pending)[left // step_in * step_out :]


def _resampler(rate: int, sampling_rate: int) -> Any:
    transforms = import_audio_package("torchaudio.transforms", "resampling")
    return transforms.Resample(
        rate, sampling_rate, lowpass_filter_width=FILTER_ZEROS, rolloff=FILTER_ROLLOFF, dtype=torch.float32
    )
