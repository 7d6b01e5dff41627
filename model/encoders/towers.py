"""Audio encoders as parts of a model: Whisper, CLAP and SSLAM behind one interface.

    tower = TOWERS["sslam"].from_checkpoint("/models/sslam")
    input_features, state_lengths = tower.features([clip, other])   # (samples,) tensors at tower.sampling_rate
    states = tower(input_features)                                  # (B, N, tower.hidden_size)

    again = TOWERS["sslam"](**tower.config)                         # JSON: the same tower, other weights
    again.load_state_dict(tower.state_dict())
    features = TOWERS["sslam"].make_features(tower.config)          # without weights: what a processor needs

    tower      states                                                           valid of a clip
    whisper    1500, every 20 ms                                                ceil(samples / 320)
    clap       64: 32 steps of time, each low band then high                    2 * ceil(samples / 15000)
    sslam      512: 64 steps of time, each 8 bands from low to high             8 per 16 frames of 10 ms begun

A clip's first `state_lengths` states are valid. They are those of the clip encoded alone: every clip is padded to the
encoder's window, and nothing depends on the rest of the batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import ClapAudioConfig, ClapAudioModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from palkernels.model.audio.features import ClapFeatures, Features, SslamFeatures, WhisperFeatures
from palkernels.model.encoders.sslam import SslamEncoder, load_sslam
from palkernels.model.encoders.weights import drawn, fill, load_config, named, one_line, outline, read_tensors
from palkernels.model.encoders.whisper import load_encoder

__all__ = ["TOWERS", "ClapTower", "SslamTower", "Tower", "WhisperTower"]


class Tower(nn.Module):
    """An audio encoder in a model.

    Frozen by default: its parameters ask for no gradient, and it stays in evaluation mode when the model around it
    trains. With `freeze=False` both are as in any module. It computes in float32 unless converted with `.to(dtype)`.

    Made under `torch.device("meta")` it has no weights yet; otherwise they are drawn on the CPU from `seed`, and the
    global random state is left as it was.

    Attributes:
        sampling_rate: Of the waveforms, in Hz.
        hidden_size: Width of the states.
        config: The constructor's arguments, JSON.
        features: Waveforms to `input_features` and `state_lengths`; see `palkernels.model.audio.features`.
        encoder: The network.
    """

    def __init__(self, make: Callable[[], nn.Module], hidden_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        if not isinstance(config["freeze"], bool):
            raise ValueError(f"freeze must be True or False, got {config['freeze']!r}")
        self.config = config
        self.hidden_size = hidden_size
        self.features = self.make_features(config)
        without_weights = torch.get_default_device().type == "meta"
        try:
            encoder = make() if without_weights else drawn(make, config["seed"])
        except (RuntimeError, TypeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"settings must describe an encoder, got {one_line(error)}") from error
        self._adopt(encoder, initialized=not without_weights)

    def _adopt(self, encoder: nn.Module, initialized: bool = True) -> Self:
        self.encoder = encoder
        if self.config["freeze"]:
            self.requires_grad_(False)
        self.train(self.training)
        if initialized:
            # Else a transformers model around this one draws the weights anew, loaded ones too, in its post_init.
            for module in self.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        return self

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> Features:
        """What turns waveforms into `input_features` for a tower of this config; needs no weights."""
        raise NotImplementedError

    @property
    def sampling_rate(self) -> int:
        return self.features.sampling_rate

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode whatever is asked for, if frozen."""
        return super().train(mode and not self.config["freeze"])

    def forward(self, input_features: Tensor) -> Tensor:
        """States (B, N, hidden_size) of `input_features` (B, *features.shape), in the weights' dtype.

        The features may have another dtype, but must be on the weights' device.
        """
        shape = self.features.shape
        if input_features.ndim != 1 + len(shape) or input_features.shape[1:] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"input_features must have shape (B, {wanted}), got {tuple(input_features.shape)}")
        dtype = next(weight.dtype for weight in self.encoder.parameters() if weight.is_floating_point())
        return self._states(input_features.to(dtype))

    def _states(self, input_features: Tensor) -> Tensor:
        raise NotImplementedError


class WhisperTower(Tower):
    """Whisper's encoder, transformers' `WhisperEncoder`.

    Args:
        seed: Of the random weights.
        freeze: As in `Tower`.
        settings: Of `WhisperConfig`, those in `SETTINGS`; the others are Whisper tiny's. `WHISPER_SIZES` of
            `palkernels.model.encoders.whisper` has the published shapes.

    Raises:
        ValueError: A setting is unknown, or no encoder has it.
    """

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

    def __init__(self, *, seed: int = 0, freeze: bool = True, **settings: Any) -> None:
        whisper = _configured(WhisperConfig, self.SETTINGS, settings)
        super().__init__(
            lambda: WhisperEncoder(whisper), whisper.d_model, _config(whisper, self.SETTINGS, seed=seed, freeze=freeze)
        )

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, freeze: bool = True) -> Self:
        """A tower with the weights of a directory with a Whisper model, whole or encoder only, in safetensors.

        Raises:
            ValueError: The directory does not hold an intact one.
        """
        encoder = load_encoder(Path(path))
        with torch.device("meta"):
            tower = cls(**_config(encoder.config, cls.SETTINGS, freeze=freeze))
        return tower._adopt(encoder)

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> WhisperFeatures:
        return WhisperFeatures(config.get("num_mel_bins", 80))

    def _states(self, input_features: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_features).last_hidden_state
        return states


class ClapTower(Tower):
    """LAION CLAP's audio encoder without fusion, transformers' `ClapAudioModel`.

    The encoder gives (B, width, 2 bands, 32 steps). The states are time-major, (B, 64, width): state 2 * t + f
    is step t's band f, f = 0 the lower.

    Args:
        seed: Of the random weights.
        freeze: As in `Tower`.
        settings: Of `ClapAudioConfig`, those in `SETTINGS`; the defaults are those of laion/clap-htsat-unfused. The
            width of the states is 8 * patch_embeds_hidden_size.

    Raises:
        ValueError: A setting is unknown, or no encoder has it.
    """

    SETTINGS = (
        "patch_embeds_hidden_size",
        "depths",
        "num_attention_heads",
        "window_size",
        "patch_size",
        "mlp_ratio",
        "qkv_bias",
        "hidden_act",
        "enable_patch_layer_norm",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "drop_path_rate",
    )
    # Together they make 2 bands x 32 steps of 10 s.
    GEOMETRY = (
        ("enable_fusion", False),
        ("spec_size", 256),
        ("num_mel_bins", 64),
        ("patch_stride", [4, 4]),
        ("patch_embed_input_channels", 1),
        ("flatten_patch_embeds", True),
    )
    STAGES = 4  # each but the first halves the grid

    def __init__(self, *, seed: int = 0, freeze: bool = True, **settings: Any) -> None:
        clap = _configured(ClapAudioConfig, self.SETTINGS, settings, **dict(self.GEOMETRY))
        for name, entries in (("depths", clap.depths), ("num_attention_heads", clap.num_attention_heads)):
            if len(entries) != self.STAGES:
                raise ValueError(f"{name} must have {self.STAGES} entries, got {entries!r}")
        clap.hidden_size = clap.patch_embeds_hidden_size * 2 ** (self.STAGES - 1)
        super().__init__(
            lambda: ClapAudioModel(clap), clap.hidden_size, _config(clap, self.SETTINGS, seed=seed, freeze=freeze)
        )

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, freeze: bool = True) -> Self:
        """A tower with the weights of a directory with a CLAP model, whole or audio only, in safetensors.

        Raises:
            ValueError: The directory does not hold an intact one, or it has fusion or another geometry.
        """
        directory = Path(path)
        clap = load_config(directory, ClapAudioConfig, ("clap", "clap_audio_model"), "a CLAP model")
        for name, value in cls.GEOMETRY:
            got = _plain(getattr(clap, name))
            if got != value:
                raise ValueError(f"{named(directory)} must have {name} {value}, got {got}")
        tensors = read_tensors(directory, _clap_name)
        what = "a CLAP audio encoder"
        tower = outline(lambda: cls(**_config(clap, cls.SETTINGS, freeze=freeze)), directory, what)
        fill(tower.encoder, tensors, directory, what)
        return tower._adopt(tower.encoder)

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> ClapFeatures:
        return ClapFeatures()

    def _states(self, input_features: Tensor) -> Tensor:
        grid: Tensor = self.encoder(input_features).last_hidden_state  # (B, width, 2 bands, 32 steps)
        return grid.permute(0, 3, 2, 1).flatten(1, 2)


class SslamTower(Tower):
    """SSLAM's encoder, which is EAT's; see `palkernels.model.encoders.sslam`.

    The states are the last block's, time-major: state 8 * t + f is step t's band f, f = 0 the lowest.

    Args:
        hidden_size: Width.
        num_layers: Blocks.
        num_heads: Attention heads.
        with_cls: Whether the CLS token comes before the others as a state of its own; it counts as valid.
        seed: Of the random weights.
        freeze: As in `Tower`.

    Raises:
        ValueError: A size is no positive integer, or `hidden_size` no multiple of 4 and `num_heads`.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        with_cls: bool = False,
        seed: int = 0,
        freeze: bool = True,
    ) -> None:
        if not isinstance(with_cls, bool):
            raise ValueError(f"with_cls must be True or False, got {with_cls!r}")
        sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
        super().__init__(
            lambda: SslamEncoder(**sizes), hidden_size, {**sizes, "with_cls": with_cls, "seed": seed, "freeze": freeze}
        )

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, with_cls: bool = False, freeze: bool = True) -> Self:
        """A tower with the weights of SSLAM or EAT: a directory, a safetensors file, or fairseq's .pt.

        Raises:
            ValueError: As `palkernels.model.encoders.sslam.load_sslam`.
        """
        encoder = load_sslam(Path(path))
        with torch.device("meta"):
            tower = cls(**encoder.sizes, with_cls=with_cls, freeze=freeze)
        return tower._adopt(encoder)

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> SslamFeatures:
        return SslamFeatures(config.get("with_cls", False))

    def _states(self, input_features: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_features)
        return states if self.config["with_cls"] else states[:, 1:]


TOWERS: dict[str, type[Tower]] = {"whisper": WhisperTower, "clap": ClapTower, "sslam": SslamTower}


def _configured(kind: Any, known: tuple[str, ...], settings: dict[str, Any], **fixed: Any) -> Any:
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"settings must be among {', '.join(known)}, got {', '.join(unknown)}")
    try:
        return kind(**settings, **fixed)
    except Exception as error:  # transformers' own kind of error for a value of another type
        raise ValueError(f"settings must be those of {kind.__name__}, got {one_line(error)}") from error


def _config(settings: Any, names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {name: _plain(getattr(settings, name)) for name in names} | more


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _clap_name(key: str) -> str | None:
    """A tensor's name inside `ClapAudioModel`, None for the text model's and the projections'."""
    if key.startswith(("text_model.", "text_projection.", "audio_projection.", "logit_scale_")):
        return None
    return key.removeprefix("audio_model.")
