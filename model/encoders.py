"""Frozen audio encoders: a waveform in, any number of audio states out.

Nothing is ever downloaded. An encoder has random weights from a seed, which costs the same time and memory as
trained ones and is what measurements need, or the weights of a checkpoint directory on this machine.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

__all__ = ["WHISPER_SIZES", "WhisperAudioEncoder"]

SAMPLING_RATE = 16_000  # Hz
WINDOW_SECONDS = 30
WINDOW_SAMPLES = WINDOW_SECONDS * SAMPLING_RATE
MAX_AMPLITUDE = 2.0**31  # Far beyond audio. The spectrum of much larger samples overflows float32.
WINDOW_STATES = 1_500  # encoder states of one window: 3,000 mel frames, halved by the second convolution

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
        # Made here, not read from a checkpoint: all Whisper models share its settings but the mel bins.
        self._features = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
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
            return cls(_load_encoder(Path(checkpoint)), weights=os.fspath(checkpoint)).to(device)
        if size not in WHISPER_SIZES:
            raise ValueError(f"size must be one of {', '.join(WHISPER_SIZES)}, got {size!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
        # The CPU's generator alone: torch.manual_seed would reseed the CUDA devices too.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            encoder = WhisperEncoder(WhisperConfig(**WHISPER_SIZES[size]))
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
        _check_encode(waveform, num_tokens)
        clip = waveform.detach().to("cpu", torch.float32)
        # Checked in float32, which a float64 sample may overflow and in which the bound is exact.
        if not bool((clip.abs() <= MAX_AMPLITUDE).all()):  # false for NaN too
            raise ValueError("waveform must be finite and within 2**31, got NaN, infinity or a larger sample")
        weight = self.encoder.conv1.weight
        states = []
        for window in range(math.ceil(num_tokens / WINDOW_STATES)):
            start = window * WINDOW_SAMPLES
            looped = clip[torch.arange(start, start + WINDOW_SAMPLES, device="cpu") % clip.numel()]
            features = self._features(looped.numpy(), sampling_rate=SAMPLING_RATE, return_tensors="pt")
            mel = features["input_features"].to(weight.device, weight.dtype)
            states.append(self.encoder(mel).last_hidden_state[0])
        joined = torch.cat(states)  # (windows * 1500, hidden_size)
        return nn.functional.adaptive_avg_pool1d(joined.T[None], num_tokens)[0].T.contiguous()


def _check_encode(waveform: torch.Tensor, num_tokens: int) -> None:
    if not isinstance(waveform, torch.Tensor):
        raise ValueError(f"waveform must be a torch.Tensor, got {type(waveform).__name__}")
    if waveform.ndim != 1:
        raise ValueError(f"waveform must have shape (samples,), got {tuple(waveform.shape)}")
    if not waveform.is_floating_point():
        raise ValueError(f"waveform must be floating point, got {waveform.dtype}")
    if waveform.numel() == 0:
        raise ValueError("waveform must hold at least one sample, got none")
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens must be a positive integer, got {num_tokens!r}")


def _load_encoder(directory: Path) -> WhisperEncoder:
    """The encoder of a Whisper checkpoint directory, float32 on the CPU.

    The tensors are read by name and each one must be there. `from_pretrained` would do more than is wanted:
    it takes pickled weights too, fills what is missing with random numbers, and takes a path that is no
    directory for the name of a model to download.
    """
    config = _load_config(directory)
    tensors = _load_tensors(directory)
    try:
        with torch.device("meta"):  # shapes only: the weights come from the file
            encoder = WhisperEncoder(config)
    except (ValueError, RuntimeError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{_named(directory)} must describe a Whisper encoder, got {_one_line(error)}") from error
    expected = {name: parameter.shape for name, parameter in encoder.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{_named(directory)} must hold every tensor of a Whisper encoder, "
            f"got {len(missing)} missing, the first {missing[0]!r}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{_named(directory)} must hold {name} with shape {tuple(shape)} as its config.json says, "
                f"got {tuple(tensors[name].shape)}"
            )
    encoder.load_state_dict({name: tensors[name].float() for name in expected}, assign=True)
    return encoder


def _named(directory: Path) -> str:
    return f"checkpoint {str(directory)!r}"


def _load_config(directory: Path) -> Any:
    if not directory.is_dir():
        raise ValueError(f"{_named(directory)} must be an existing directory, got none there")
    path = directory / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{_named(directory)} must hold a readable config.json, got {_one_line(error)}") from error
    if kind != "whisper":
        raise ValueError(f"{_named(directory)} must hold a Whisper model, got model_type {kind!r}")
    try:
        config = WhisperConfig.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # whatever a malformed setting makes transformers raise
        raise ValueError(f"{_named(directory)} must hold a valid config.json, got {_one_line(error)}") from error
    if config.max_source_positions != WINDOW_STATES:
        got = config.max_source_positions
        raise ValueError(f"{_named(directory)} must have {WINDOW_STATES} source positions, got {got}")
    return config


def _load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors by their name inside `WhisperEncoder`, from one safetensors file or shards."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    tensors: dict[str, torch.Tensor] = {}
    try:
        if single.is_file():
            files = {single.name}
        elif index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            raise ValueError("neither model.safetensors nor its index")
        for file in sorted(files):
            if Path(file).name != file:
                raise ValueError(f"a shard outside the directory, {file!r}")
            with safe_open(directory / file, framework="pt", device="cpu") as weights:
                for key in weights.keys():  # noqa: SIM118 (a safetensors file cannot be iterated)
                    name = _encoder_name(key)
                    if name is not None:
                        tensors[name] = weights.get_tensor(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{_named(directory)} must hold safetensors weights, got {_one_line(error)}") from error
    return tensors


def _encoder_name(key: str) -> str | None:
    """A tensor's name without the encoder's place in its model, None for the decoder's tensors."""
    for prefix in ("model.encoder.", "encoder."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    outside = key.startswith(("model.", "decoder.", "proj_out."))
    return None if outside else key


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
