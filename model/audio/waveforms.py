"""Clips as a caller gives them, arrays or files, as waveforms that an encoder can take, within limits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy
import torch
from torch import Tensor

from palkernels.errors import one_line
from palkernels.model.audio.files import load_audio
from palkernels.model.audio.limits import MAX_CHANNELS, AudioError, check_amplitude, check_rates
from palkernels.model.audio.resampling import resample

__all__ = ["check_rank", "waveform"]


def waveform(clip: Any, rate: int | None, sampling_rate: int, *, max_seconds: float, max_bytes: int) -> Tensor:
    """Return one clip as (samples,) at `sampling_rate` Hz, float32 on the CPU.

    Args:
        clip: (samples,), a float tensor or NumPy array, mono; such an array with its rate, {"array", "sampling_rate"};
            torchcodec's AudioSamples, or a decoder that gives them, of which the mean over the channels is taken; or
            the path of a file or its bytes, for `load_audio`, in a dict or not.
        rate: Of an array that comes without its own, in Hz.
        sampling_rate: Of the result, in Hz.
        max_seconds, max_bytes: The longest clip, and the largest array or file. Both are looked at before anything is
            copied or decoded; of a decoder, the duration that it states.

    Raises:
        AudioError: The clip is beyond a limit, damaged, empty, of another rank or dtype, or not finite.
    """
    if isinstance(clip, Mapping):
        clip, rate = _from_dict(clip, rate)
    elif callable(getattr(clip, "get_all_samples", None)):
        clip, rate = _mono(_decoded(clip, max_seconds), max_bytes)
    elif not isinstance(clip, numpy.ndarray | Tensor) and hasattr(clip, "data") and hasattr(clip, "sample_rate"):
        clip, rate = _mono(clip, max_bytes)
    if isinstance(clip, str | os.PathLike | bytes):
        if not isinstance(clip, bytes) and str(clip).startswith(("http://", "https://")):
            raise AudioError(f"audio must be an array or a file on this machine, got the address {str(clip)!r}")
        return load_audio(clip, sampling_rate, max_bytes=max_bytes, max_seconds=max_seconds)
    if not isinstance(clip, numpy.ndarray | Tensor):
        raise AudioError(f"audio must be a NumPy array, a tensor or a path, got {type(clip).__name__}")
    check_rank(clip)
    is_float = clip.dtype.is_floating_point if isinstance(clip, Tensor) else clip.dtype in ("f2", "f4", "f8")
    if not is_float:
        way = ": samples of 16 bits are divided by 32768" if str(clip.dtype).endswith("int16") else ""
        raise AudioError(f"audio must be floating point, in [-1, 1] by custom, got {clip.dtype}{way}")
    if rate is None:
        raise AudioError('sampling_rate must be given with arrays that are not {"array", "sampling_rate"}, got None')
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


def check_rank(clip: Any) -> None:
    """Check that an array is one clip of one channel.

    Raises:
        AudioError: It has another number of dimensions.
    """
    if clip.ndim != 1:
        way = "list(audio) is one clip per row, audio.mean(0) one clip of rows that are channels"
        raise AudioError(f"audio must have shape (samples,), one channel, got {tuple(clip.shape)}: {way}")


def _from_dict(clip: Mapping[str, Any], rate: int | None) -> tuple[Any, Any]:
    """Return the array, path or bytes that a clip of `datasets` holds, decoded or not, and its rate."""
    if clip.get("array") is not None and clip.get("sampling_rate") is not None:
        return clip["array"], clip["sampling_rate"]
    if clip.get("array") is None and isinstance(clip.get("bytes"), bytes):
        return clip["bytes"], rate
    if clip.get("array") is None and clip.get("bytes") is None and isinstance(clip.get("path"), str | os.PathLike):
        return clip["path"], rate
    held = sorted(str(key) for key, value in clip.items() if value is not None)
    raise AudioError(f"audio must be a dict with an array and its sampling_rate, bytes or a path, got {held}")


def _decoded(decoder: Any, max_seconds: float) -> Any:
    """Return what a decoder decodes, unless it says that it is too long."""
    seconds = getattr(getattr(decoder, "metadata", None), "duration_seconds", None)
    if isinstance(seconds, int | float) and seconds > max_seconds:
        raise AudioError(f"audio must be at most {max_seconds:g} s long, got {seconds:.2f} s by its header")
    try:
        return decoder.get_all_samples()
    except (OSError, RuntimeError, ValueError) as error:
        raise AudioError(f"audio must be decodable, got {one_line(error)}") from error


def _mono(samples: Any, max_bytes: int) -> tuple[Tensor, Any]:
    """Return the mean over the channels of decoded samples (channels, samples), and their rate."""
    data = samples.data
    if not isinstance(data, Tensor) or data.ndim != 2 or not data.is_floating_point():
        got = f"{tuple(data.shape)} of {data.dtype}" if isinstance(data, Tensor) else type(data).__name__
        raise AudioError(f"decoded audio must be a float tensor (channels, samples), got {got}")
    if not 1 <= data.shape[0] <= MAX_CHANNELS:
        raise AudioError(f"audio must have 1 to {MAX_CHANNELS} channels, got {data.shape[0]}")
    if data.numel() * data.itemsize > max_bytes:
        raise AudioError(f"audio must have at most {max_bytes} bytes, got {data.numel() * data.itemsize}")
    # In float64, where the sum of large samples does not overflow.
    return data[0] if data.shape[0] == 1 else data.mean(dim=0, dtype=torch.float64).float(), samples.sample_rate
