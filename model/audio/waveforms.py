"""Clips as a caller gives them, arrays or files, as waveforms that an encoder can take, within limits."""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any

import numpy
import torch
from torch import Tensor

from palkernels.model.audio.files import load_audio
from palkernels.model.audio.limits import AudioError, check_amplitude, check_rates
from palkernels.model.audio.resampling import resample

__all__ = ["waveform"]


def waveform(clip: Any, rate: int | None, sampling_rate: int, *, max_seconds: float, max_bytes: int) -> Tensor:
    """Return one clip as (samples,) at `sampling_rate` Hz, float32 on the CPU.

    Args:
        clip: (samples,), a float tensor or NumPy array, mono; or the path of a file, for `load_audio`.
        rate: Of an array, in Hz.
        sampling_rate: Of the result, in Hz.
        max_seconds, max_bytes: The longest clip, and the largest array or file. Both are looked at before anything is
            copied or decoded.

    Raises:
        AudioError: The clip is beyond a limit, damaged, empty, of another rank or dtype, or not finite.
    """
    if isinstance(clip, str | os.PathLike):
        if str(clip).startswith(("http://", "https://")):
            raise AudioError(f"audio must be an array or a file on this machine, got the address {str(clip)!r}")
        return load_audio(clip, sampling_rate, max_bytes=max_bytes, max_seconds=max_seconds)
    if not isinstance(clip, numpy.ndarray | Tensor):
        raise AudioError(f"audio must be a NumPy array, a tensor or a path, got {type(clip).__name__}")
    if clip.ndim != 1:
        raise AudioError(f"audio must have shape (samples,), one channel, got {tuple(clip.shape)}")
    is_float = clip.dtype.is_floating_point if isinstance(clip, Tensor) else clip.dtype in ("f2", "f4", "f8")
    if not is_float:
        raise AudioError(f"audio must be floating point, in [-1, 1] by custom, got {clip.dtype}")
    if rate is None:
        raise AudioError("sampling_rate must be given with arrays, got None")
    if isinstance(rate, bool) or not isinstance(rate, Integral):
        raise AudioError(f"sampling_rate must be an integer, got {rate!r}")
    rate = int(rate)  # NumPy's integers, too
    check_rates("audio", rate, sampling_rate)
    samples = clip.shape[0]
    if not samples:
        raise AudioError("audio must hold at least one sample, got none")
    if samples > max_seconds * rate:
        raise AudioError(f"audio must be at most {max_seconds:g} s long, got {samples / rate:.2f} s")
    if samples * clip.dtype.itemsize > max_bytes:
        raise AudioError(f"audio must have at most {max_bytes} bytes, got {samples * clip.dtype.itemsize}")
    if isinstance(clip, numpy.ndarray):
        with numpy.errstate(over="ignore", invalid="ignore"):  # check_amplitude finds what overflows
            clip = torch.from_numpy(clip.astype(numpy.float32))
    clip = clip.detach().to("cpu", torch.float32)
    check_amplitude("audio", clip, rate)
    return resample(clip, rate, sampling_rate)
