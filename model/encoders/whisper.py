"""Whisper's encoder: transformers' network as a tower, and pooled to any number of audio tokens for measurements."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from palkernels.model.audio.features import WhisperFeatures
from palkernels.model.audio.limits import checked_waveform
from palkernels.model.encoders.base import Tower, configured, plain_settings
from palkernels.model.encoders.ctranslate2 import is_ctranslate2, read_whisper
from palkernels.model.encoders.layouts import WHISPER
from palkernels.model.encoders.weights import checkpoint_name, fill, load_config, outline, read_tensors

__all__ = ["WHISPER_SIZES", "WhisperAudioEncoder", "WhisperTower"]

# Tensors of the models around an encoder: a decoder, the head of a classifier.
NOT_THE_ENCODER = ("model.decoder.", "decoder.", "proj_out.", "projector.", "classifier.", "layer_weights")

# The published encoders, as arguments of WhisperTower.
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


class WhisperTower(Tower):
    """Whisper's encoder, transformers' `WhisperEncoder`: 1500 states of 30 s, or fewer of a shorter window.

    Whisper was trained on 30 s alone, and encodes them whatever the clip's length. In a shorter window it hears the
    same without the silence behind: a tenth of the window takes less than a tenth of the time, and the states differ,
    by what docs/audio_llm.md says. The weights are the same for every window, positions included, of which the first
    are used.

    Args:
        window_seconds: The window, a multiple of a state's 20 ms; None: 30 s.
        seed: Seed of the random weights.
        freeze: Whether the weights stay as they are in training; see `Tower`.
        settings: Arguments of `WhisperConfig`, those in `SETTINGS`; the others are Whisper tiny's. `WHISPER_SIZES` has
            the published shapes.

    Raises:
        ValueError: A setting is unknown, or no encoder can be built with it.
    """

    layout = WHISPER
    SETTINGS = (
        "d_model",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "num_mel_bins",
        "activation_function",
        "scale_embedding",
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "encoder_layerdrop",
    )

    features: WhisperFeatures

    def __init__(
        self, *, window_seconds: float | None = None, seed: int = 0, freeze: bool = True, **settings: Any
    ) -> None:
        whisper = configured(WhisperConfig, self.SETTINGS, settings)
        config = plain_settings(whisper, self.SETTINGS) | {"seed": seed, "freeze": freeze}
        if window_seconds is not None:
            config["window_seconds"] = window_seconds
        super().__init__(lambda: WhisperEncoder(whisper), whisper.d_model, config)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], *, freeze: bool = True, window_seconds: float | None = None
    ) -> Self:
        """Return a tower with the weights of a directory with a Whisper model: whole or encoder only in safetensors, or
        in CTranslate2's format, as faster-whisper's are.

        Raises:
            ValueError: The directory does not hold an intact one, or there is no such window.
        """
        own: dict[str, Any] = {"freeze": freeze, "window_seconds": window_seconds}
        cls.make_features(own)  # refuses a window before anything is read
        directory = Path(path)
        if is_ctranslate2(directory):
            settings, tensors = read_whisper(directory)
            tower = outline(lambda: cls(**settings, **own), directory, WHISPER)
            fill(tower.encoder, tensors, directory, WHISPER, reason="as its other tensors say")
            return tower._adopt(tower.encoder)
        whisper = load_config(directory, WhisperConfig, ("whisper",), "a Whisper model")
        positions = whisper.max_source_positions
        if positions != WhisperFeatures.MOST_STATES:
            name = checkpoint_name(directory)
            raise ValueError(f"{name} must have {WhisperFeatures.MOST_STATES} source positions, got {positions}")
        tensors = read_tensors(directory, _name_in_encoder)
        encoder = outline(lambda: WhisperEncoder(whisper), directory, WHISPER)
        layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
        depths = f"; its config.json has encoder_layers {whisper.encoder_layers}, its tensors {layers}"
        fill(encoder, tensors, directory, WHISPER, advice=depths if layers not in (0, whisper.encoder_layers) else "")
        with torch.device("meta"):
            tower = cls(**plain_settings(whisper, cls.SETTINGS), **own)
        return tower._adopt(encoder)

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> WhisperFeatures:
        """Return the log-mel features with the tower's number of mel bins and its window."""
        return WhisperFeatures(config.get("num_mel_bins", 80), config.get("window_seconds"))

    def _adopt(self, encoder: nn.Module, initialized: bool = True) -> Self:
        # The encoder looks here for how many frames it takes and how many of its positions it adds.
        network: Any = encoder
        network.config.max_source_positions = self.features.num_states
        network.embed_positions.num_embeddings = self.features.num_states
        return super()._adopt(encoder, initialized)

    def _encode(self, input_features: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_features).last_hidden_state
        return states


class WhisperAudioEncoder(WhisperTower):
    """A frozen Whisper tower that gives any number of audio tokens of any clip, for measurements.

    Make one with `build`.

    Attributes:
        weights: "random (seed 0)" or the checkpoint's path, for printing beside results.
    """

    weights: str

    @classmethod
    def build(
        cls,
        size: str = "tiny",
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Return an encoder with random weights, or with those of a local checkpoint.

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
            encoder = cls.from_checkpoint(checkpoint)
            encoder.weights = os.fspath(checkpoint)
        elif size in WHISPER_SIZES:
            with torch.device("cpu"):  # under a default device "meta" a tower would have no weights
                encoder = cls(seed=seed, freeze=True, **WHISPER_SIZES[size])
            encoder.weights = f"random (seed {seed})"
        else:
            raise ValueError(f"size must be one of {', '.join(WHISPER_SIZES)}, got {size!r}")
        return encoder.to(device)

    @property
    def size(self) -> str:
        """The name of the published shape in `WHISPER_SIZES`, or "custom" for a checkpoint of another shape."""
        return next((name for name, shape in WHISPER_SIZES.items() if shape.items() <= self.config.items()), "custom")

    @torch.no_grad()
    def encode(self, waveform: Tensor, num_tokens: int) -> Tensor:
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
        clip = checked_waveform("waveform", waveform, self.sampling_rate)
        device = next(self.encoder.parameters()).device
        window_samples = self.features.max_samples
        states = []
        for window in range(math.ceil(num_tokens / self.features.num_states)):
            start = window * window_samples
            looped = clip[torch.arange(start, start + window_samples, device="cpu") % clip.numel()]
            input_features, _ = self.features([looped])
            states.append(self(input_features.to(device))[0])
        joined = torch.cat(states)  # (windows * 1500, hidden_size)
        return nn.functional.adaptive_avg_pool1d(joined.T[None], num_tokens)[0].T.contiguous()


def _name_in_encoder(key: str) -> str | None:
    """Return a stored tensor's name in `WhisperEncoder`, None for the tensors of the model around it."""
    for prefix in ("model.encoder.", "encoder."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return None if key.startswith(NOT_THE_ENCODER) else key
