"""Frozen audio encoders: a waveform in, any number of audio states out.

Nothing is ever downloaded. An encoder has random weights from a seed, which costs the same time and memory as
trained ones and is what measurements need, or the weights of a checkpoint directory on this machine.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Self

import torch
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from palkernels.model.audio.features import WhisperFeatures, checked_waveform
from palkernels.model.encoders.weights import drawn, fill, load_config, named, outline, read_tensors

__all__ = ["WHISPER_SIZES", "WhisperAudioEncoder"]

WINDOW_SAMPLES = WhisperFeatures.max_samples  # 30 s at 16 kHz
WINDOW_STATES = WhisperFeatures.num_states

# Tensors of the models around an encoder: a decoder, the head of a classifier.
NOT_THE_ENCODER = ("model.", "decoder.", "proj_out.", "projector.", "classifier.", "layer_weights")

# The published encoders.
WHISPER_SIZES: dict[str, dict[str, int]] = {
    name: {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": width // 64,
        "encoder_ffn_dim": 4 * width,
        "num_mel_bins": mel_bins,
    }
    for name, width, layers, mel_bins in (
        ("tiny", 384, 4, 80),
        ("base", 512, 6, 80),
        ("small", 768, 12, 80),
        ("medium", 1024, 24, 80),
        ("large-v3", 1280, 32, 128),
    )
}


class WhisperAudioEncoder(nn.Module):
    """A frozen Whisper encoder whose states are pooled to the number of audio tokens asked for.

    Make one with `build`. It has no gradients, stays in evaluation mode inside a model that is trained, and
    computes in float32 unless it is converted with `.to(dtype)`.

    Attributes:
        size: Name of the published shape in `WHISPER_SIZES`, or "custom" for a checkpoint of another shape.
        weights: "random (seed 0)" or the checkpoint's path, for printing beside results.
        hidden_size: Width of the states.
        encoder: transformers' `WhisperEncoder`.
    """

    def __init__(self, encoder: WhisperEncoder, *, weights: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.weights = weights
        config = encoder.config
        self.hidden_size: int = config.d_model
        self.size = next(
            (
                name
                for name, shape in WHISPER_SIZES.items()
                if all(getattr(config, key) == value for key, value in shape.items())
            ),
            "custom",
        )
        self._features = WhisperFeatures(config.num_mel_bins)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def build(
        cls,
        size: str = "tiny",
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Self:
        """An encoder with random weights, or with those of a local checkpoint.

        Args:
            size: The shape of a random encoder: "tiny", "base", "small", "medium" or "large-v3". A checkpoint
                brings its own shape, and `size` is not looked at.
            checkpoint: A directory with config.json and safetensors weights of a Whisper model, whole or
                encoder only, as transformers' `save_pretrained` writes it. No other weight format is read.
            seed: Seed of the random weights. They are drawn on the CPU, so they are the same for every
                device, and the global random state is left as it was.
            device: Where the encoder lives.

        Raises:
            ValueError: `size` is unknown, `seed` is no such integer, or `checkpoint` is not a directory with
                an intact Whisper encoder.
        """
        if checkpoint is not None:
            return cls(load_encoder(Path(checkpoint)), weights=os.fspath(checkpoint)).to(device)
        if size not in WHISPER_SIZES:
            raise ValueError(f"size must be one of {', '.join(WHISPER_SIZES)}, got {size!r}")
        encoder = drawn(lambda: WhisperEncoder(WhisperConfig(**WHISPER_SIZES[size])), seed)
        return cls(encoder, weights=f"random (seed {seed})").to(device)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the `train()` of a model around a frozen encoder must not reach it."""
        super().train(False)
        return self

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Encode a clip into exactly `num_tokens` states.

        The clip is repeated end to end until it fills ceil(num_tokens / 1500) windows of 30 s, and what it
        has beyond them is not heard. Each window gives 1500 states. All windows' states, in order, are
        average-pooled to `num_tokens`: with n states, pooled state i is the mean of those from
        floor(i * n / num_tokens) to, but not including, ceil((i + 1) * n / num_tokens). Windows are encoded
        one by one, so memory does not grow with them beyond their states.

        Args:
            waveform: (samples,) at 16 kHz, any float dtype, any device.
            num_tokens: States wanted, at least 1.

        Returns:
            (num_tokens, hidden_size) in the encoder's dtype and on its device, without gradient.

        Raises:
            ValueError: The waveform is not one-dimensional, not floating point, empty, not finite or
                beyond 2**31, or `num_tokens` is not a positive integer.
        """
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
            raise ValueError(f"num_tokens must be a positive integer, got {num_tokens!r}")
        clip = checked_waveform(waveform, "waveform")
        weight = self.encoder.conv1.weight
        states = []
        for window in range(math.ceil(num_tokens / WINDOW_STATES)):
            start = window * WINDOW_SAMPLES
            looped = clip[torch.arange(start, start + WINDOW_SAMPLES, device="cpu") % clip.numel()]
            mel, _ = self._features([looped])
            states.append(self.encoder(mel.to(weight.device, weight.dtype)).last_hidden_state[0])
        joined = torch.cat(states)  # (windows * 1500, hidden_size)
        return nn.functional.adaptive_avg_pool1d(joined.T[None], num_tokens)[0].T.contiguous()


def load_encoder(directory: Path) -> WhisperEncoder:
    """The encoder of a Whisper checkpoint directory, float32 on the CPU."""
    config = load_config(directory, WhisperConfig, ("whisper",), "a Whisper model")
    if config.max_source_positions != WINDOW_STATES:
        got = config.max_source_positions
        raise ValueError(f"{named(directory)} must have {WINDOW_STATES} source positions, got {got}")
    tensors = read_tensors(directory, _encoder_name)
    encoder = outline(lambda: WhisperEncoder(config), directory, "a Whisper encoder")
    fill(encoder, tensors, directory, "a Whisper encoder")
    return encoder


def _encoder_name(key: str) -> str | None:
    """A tensor's name without the encoder's place in its model, None for what is not the encoder's."""
    for prefix in ("model.encoder.", "encoder."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return None if key.startswith(NOT_THE_ENCODER) else key
