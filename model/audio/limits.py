"""What audio is accepted: the bounds on files, waveforms and samples, and the checks that hold them.

Every bound is generous for sound and small for a machine, so that no file and no array can ask for more memory or time
than real audio takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["AudioError", "check_amplitude", "check_rates", "checked_waveform"]

MAX_BYTES = 256 * 10**6  # of a file or an array; an hour in float32 at 16 kHz has 230 * 10**6
MIN_RATE = 1_000  # Hz. Slower recordings are not sound that a model here was trained on.
MAX_RATE = 768_000  # Hz. The fastest converters on sale.
MAX_CHANNELS = 64  # Seventh-order ambisonics.
MAX_AMPLITUDE = 2.0**31  # Full scale of the widest integers, should someone store them as floats unscaled.

# A resampler's table has rate / gcd taps for each of its sampling_rate / gcd phases. Every usual pair of rates needs
# under 300,000 taps (11,025 and 16,000 Hz). A pair without common divisors, such as 44,101 and 16,000 Hz, needs 700
# million: a header that states such a rate would otherwise take gigabytes of memory.
MAX_RESAMPLER_TAPS = 2**24


class AudioError(ValueError):
    """A clip that is refused. The message is one line: which clip, what must hold, and what came."""


def check_rates(name: str, rate: int, sampling_rate: int) -> None:
    """Check that a clip at `rate` Hz can be converted to `sampling_rate` Hz.

    Raises:
        AudioError: `rate` is out of bounds, or the conversion would need too large a table.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"{name} must have a sampling rate of {MIN_RATE} to {MAX_RATE} Hz, got {rate} Hz")
    divisor = math.gcd(rate, sampling_rate)
    if rate != sampling_rate and (rate // divisor) * (sampling_rate // divisor) > MAX_RESAMPLER_TAPS:
        raise AudioError(
            f"{name} must have a sampling rate with a larger common divisor with {sampling_rate} Hz, "
            f"got {rate} Hz (greatest common divisor {divisor})"
        )


def check_amplitude(name: str, samples: Tensor, sampling_rate: int, first_sample: int = 0) -> None:
    """Check that every sample is a number that can be audio.

    Args:
        name: What the error calls the clip.
        samples: (samples,) float32. A float64 sample may overflow float32, so convert first.
        sampling_rate: In Hz, to say where in the clip the fault is.
        first_sample: The clip's samples before these, where a clip is checked block by block.

    Raises:
        AudioError: A sample is NaN, infinite or beyond 2**31 in amplitude.
    """
    within = samples.abs() <= MAX_AMPLITUDE  # false for NaN too
    if not bool(within.all()):
        first = int((~within).nonzero()[0])
        seconds = (first_sample + first) / sampling_rate
        sample = samples[first].item()
        raise AudioError(f"{name} must hold finite samples within 2**31, got {sample:g} near {seconds:.3f} s")


def checked_waveform(name: str, waveform: Tensor, sampling_rate: int, max_samples: int | None = None) -> Tensor:
    """Return a clip for an encoder as (samples,) float32 on the CPU, detached, after checking it.

    Args:
        name: What the error calls the clip.
        waveform: (samples,), any float dtype, any device.
        sampling_rate: In Hz.
        max_samples: The encoder's window; None: any length.

    Raises:
        ValueError: The clip is no tensor, not one-dimensional, not floating point, empty or longer than the window.
        AudioError: A sample is NaN, infinite or beyond 2**31 in amplitude.
    """
    if not isinstance(waveform, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(waveform).__name__}")
    if waveform.ndim != 1:
        raise ValueError(f"{name} must have shape (samples,), got {tuple(waveform.shape)}")
    if not waveform.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {waveform.dtype}")
    if waveform.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    if max_samples is not None and waveform.numel() > max_samples:
        window = f"the encoder's window of {max_samples / sampling_rate:g} s ({max_samples} samples)"
        raise ValueError(f"{name} must fit {window}, got {waveform.numel()} samples")
    clip = waveform.detach().to("cpu", torch.float32)
    check_amplitude(name, clip, sampling_rate)
    return clip
