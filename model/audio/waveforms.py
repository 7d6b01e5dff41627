"""Clips as a caller gives them, arrays or files, as waveforms that an encoder can take, within limits."""

import os
from numbers import Integral
from typing import Any

import numpy
import torch
from torch import Tensor

from palkernels.model.audio.files import MAX_AMPLITUDE, AudioError, check_rates, load_audio, resample

__all__ = ["waveform"]


def waveform(clip: Any, rate: int | None, sampling_rate: int, *, max_seconds: float, max_bytes: int) -> Tensor:
    """One clip (samples,) at ``sampling_rate`` Hz, float32 on the CPU.

    Args:
        clip: (samples,), a float tensor or NumPy array, mono; or the path of a file, for :func:`load_audio`.
        rate: of an array, in Hz.
        max_seconds, max_bytes: the longest clip, and the largest array or file. Both are looked at before anything is
            copied or decoded.

    Raises:
        AudioError: the clip is beyond a limit, damaged, empty, of another rank or dtype, or not finite.
    """
    if isinstance(clip, str | os.PathLike):
        if str(clip).startswith(("http://", "https://")):
            raise AudioError(f"audio must be an array or a file on this machine, got the address {str(clip)!r}")
        return load_audio(clip, sampling_rate, max_bytes=max_bytes, max_seconds=max_seconds)
    if not isinstance(clip, numpy.ndarray | Tensor):
        raise AudioError(f"audio must be a NumPy array, a tensor or a path, got {type(clip).__name__}")
    if clip.ndim != 1:
        raise AudioError(f"audio must have shape (samples,), one channel, got {tuple(clip.shape)}")
    kind = clip.dtype.is_floating_point if isinstance(clip, Tensor) else clip.dtype in ("f2", "f4", "f8")
    if not kind:
        raise AudioError(f"audio must be floating point, in [-1, 1] by custom, got {clip.dtype}")
    if rate is None:
        raise AudioError("sampling_rate must be given with arrays, got None")
    if isinstance(rate, bool) or not isinstance(rate, Integral):
        raise AudioError(f"sampling_rate must be an integer, got {rate!r}")
    rate = int(rate)  # NumPy's, too
    check_rates("audio", rate, sampling_rate)
    samples = clip.shape[0]
    if not samples:
        raise AudioError("audio must hold at least one sample, got none")
    if samples > max_seconds * rate:
        raise AudioError(f"audio must be at most {max_seconds:g} s long, got {samples / rate:.2f} s")
    if samples * clip.dtype.itemsize > max_bytes:
        raise AudioError(f"audio must have at most {max_bytes} bytes, got {samples * clip.dtype.itemsize}")
    if isinstance(clip, numpy.ndarray):
        with numpy.errstate(over="ignore", invalid="ignore"):  # found below
            clip = torch.from_numpy(clip.astype(numpy.float32))
    clip = clip.detach().to("cpu", torch.float32)
    if not bool((clip.abs() <= MAX_AMPLITUDE).all()):  # false for NaN too
        raise AudioError("audio must hold finite samples within 2**31, got NaN, infinity or a larger sample")
    return resample(clip, rate, sampling_rate)
