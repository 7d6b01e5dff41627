"""What a request's clips must be, and how many tokens they become, which is known before anything is encoded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palkernels.model.audio.limits import AudioError
from palkernels.model.audio.waveforms import check_rank
from palkernels.model.pal import PalConfig, PalProcessor

# What states of a caller may be: what connectors make is thousands of times smaller, and what layers make of as much
# stays finite.
LARGEST = 1e4
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

__all__ = ["check_embeds", "check_length", "longest_seconds", "read_clip", "token_counts", "window_counts"]


def read_clip(clip: Any, sampling_rate: int) -> tuple[np.ndarray, int]:
    """Return a clip as samples (n,) and their rate in Hz.

    Args:
        clip: an array, or a pair of one and its rate.
        sampling_rate: of an array that comes without its own.

    Raises:
        AudioError: it is neither, or an array of several channels or of none.
    """
    samples, rate = clip if isinstance(clip, tuple) and len(clip) == 2 else (clip, sampling_rate)
    if isinstance(samples, list):
        samples = np.asarray(samples, dtype=np.float32)
    if isinstance(samples, Tensor):
        samples = samples.detach().cpu().float().numpy()
    if not isinstance(samples, np.ndarray):
        raise AudioError(f"audio must be an array, or a pair of one and its rate, got {type(samples).__name__}")
    check_rank(samples)
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not float(rate).is_integer():
        raise AudioError(f"sampling_rate must be an integer, got {rate!r}")
    return samples, int(rate)


def check_length(processor: PalProcessor, samples: int, rate: int, most: int) -> None:
    """Check that a clip is not too long, by its samples alone.

    Args:
        processor: the model's, which has the longest clip in seconds.
        samples: of the clip.
        rate: of the clip, in Hz.
        most: the most audio tokens.

    Raises:
        AudioError: it is longer than ``max_seconds``, or has more tokens than the context.
    """
    if not samples:
        raise AudioError("audio must hold at least one sample, got none")
    if samples > processor.longest_clip * rate:
        limit = "max_bytes" if processor.max_seconds is None else "max_seconds"
        raise AudioError(
            f"audio must be at most {processor.longest_clip:g} s long, the processor's {limit}, got "
            f"{samples / rate:.2f} s"
        )
    tokens = tokens_of_samples(processor, samples, rate)
    if tokens > most:
        seconds = longest_seconds(processor, most)
        raise AudioError(
            f"audio must have at most {most} tokens, about {seconds:.1f} s, so that max_model_len {most + 1} holds one "
            f"more of text, got {tokens} tokens of {samples / rate:.2f} s"
        )


def tokens_of_samples(processor: PalProcessor, samples: int, rate: int) -> int:
    """Return how many tokens a clip of ``samples`` samples at ``rate`` Hz becomes."""
    lengths = processor.state_lengths(lambda own: max(1, -(-samples * own // rate)))
    return token_counts(processor, lengths.unsqueeze(0))[0]


def longest_seconds(processor: PalProcessor, most: int) -> float:
    """Return the seconds, to 10 ms, of the longest clip that the processor takes in at most ``most`` tokens."""

    def fits(hundredths: int) -> bool:
        return tokens_of_samples(processor, hundredths, 100) <= most

    least, longest = 0, int(processor.longest_clip * 100)
    while least < longest:  # tokens do not decrease with seconds
        middle = (least + longest + 1) // 2
        least, longest = (middle, longest) if fits(middle) else (least, middle - 1)
    return least / 100


def token_counts(processor: PalProcessor, audio_lengths: Tensor) -> list[int]:
    """Return how many tokens, LAL's and PLITS' together, clips of ``audio_lengths`` (C, towers) valid states become."""
    total: Tensor = processor.num_placeholders(audio_lengths) + processor.num_tokens(audio_lengths, "lal")
    return total.tolist()


def window_counts(processor: PalProcessor, audio_lengths: Tensor) -> Tensor:
    """Return how many windows each clip has for each tower (C, towers), from its valid states."""
    states = torch.tensor([window.states for window in processor.windows])
    return (audio_lengths - 1).div(states, rounding_mode="floor") + 1


def check_embeds(config: PalConfig, clips: Sequence[Tensor], most: int) -> None:
    """Check states that a caller gives in the place of clips: what a connector makes of each, (tokens, d).

    Of what is not finite, or overflows in a layer, keys and values would lie in the cache's blocks behind this request.

    Args:
        config: the model's.
        clips: the states.
        most: the most tokens of a clip.

    Raises:
        AudioError: they are none, too many, too large, not finite or no plain tensors, or the model's encoders enter in
            two ways.
    """
    if config.uses("plits") and config.uses("lal") and not config.summary_tokens:
        raise AudioError("audio_embeds must go to a model whose audio enters in one way, got lal and plits: send audio")
    for number, states in enumerate(clips):
        name, width = f"audio_embeds[{number}]", config.text_config.hidden_size
        if states.layout != torch.strided or states.is_nested or states.device.type != "cpu" or states.requires_grad:
            raise AudioError(f"{name} must be a plain tensor on the CPU, without gradients, got {_kind(states)}")
        if states.dtype not in FLOATS or states.ndim != 2 or states.shape[1] != width:
            raise AudioError(f"{name} must be floats (tokens, {width}), got {states.dtype} {tuple(states.shape)}")
        tokens = len(states) + config.summary_tokens
        if not len(states) >= 1 or tokens > most:
            raise AudioError(f"{name} must have 1 to {most - config.summary_tokens} tokens, got {len(states)}")
        if not bool((states.abs() <= LARGEST).all()):  # NaN is not, either
            raise AudioError(f"{name} must be finite and within {LARGEST:,.0f} of 0, got {_extreme(states)}")


def _kind(states: Tensor) -> str:
    if states.is_nested:
        return "a nested tensor"
    return f"{states.layout} on {states.device}" + (" that requires them" if states.requires_grad else "")


def _extreme(states: Tensor) -> str:
    return f"{float(states.abs().max()):.3g}" if bool(states.isfinite().all()) else "NaN or infinity"
