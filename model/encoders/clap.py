"""LAION CLAP's audio encoder: transformers' network, its states in time-major order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import ClapAudioConfig, ClapAudioModel

from palkernels.model.audio.features import ClapFeatures
from palkernels.model.encoders.base import Tower, configured, plain_settings
from palkernels.model.encoders.layouts import CLAP
from palkernels.model.encoders.weights import checkpoint_name, fill, load_config, outline, read_tensors

__all__ = ["ClapTower"]

# Tensors of the models around an encoder: the text's half, projections, the head of a classifier.
NOT_THE_ENCODER = ("text_model.", "text_projection.", "audio_projection.", "logit_scale_", "classifier.")


class ClapTower(Tower):
    """LAION CLAP's audio encoder without fusion, transformers' `ClapAudioModel`.

    The encoder gives (B, width, 2 bands, 32 steps). The states are time-major, (B, 64, width): state 2 * t + f
    is band f of step t, f = 0 the lower.

    Args:
        seed: Seed of the random weights.
        freeze: Whether the weights stay as they are in training; see `Tower`.
        settings: Arguments of `ClapAudioConfig`, those in `SETTINGS`; the defaults are those of
            laion/clap-htsat-unfused. The width of the states is 8 * patch_embeds_hidden_size.

    Raises:
        ValueError: A setting is unknown, or no encoder can be built with it.
    """

    layout = CLAP
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
    GEOMETRY: tuple[tuple[str, Any], ...] = (
        ("enable_fusion", False),
        ("spec_size", 256),
        ("num_mel_bins", 64),
        ("patch_stride", [4, 4]),
        ("patch_embed_input_channels", 1),
        ("flatten_patch_embeds", True),
    )
    STAGES = 4  # each but the first halves the grid

    def __init__(self, *, seed: int = 0, freeze: bool = True, **settings: Any) -> None:
        clap = configured(ClapAudioConfig, self.SETTINGS, settings, **dict(self.GEOMETRY))
        for name, entries in (("depths", clap.depths), ("num_attention_heads", clap.num_attention_heads)):
            if len(entries) != self.STAGES:
                raise ValueError(f"{name} must have {self.STAGES} entries, got {entries!r}")
        clap.hidden_size = clap.patch_embeds_hidden_size * 2 ** (self.STAGES - 1)
        config = plain_settings(clap, self.SETTINGS) | {"seed": seed, "freeze": freeze}
        super().__init__(lambda: ClapAudioModel(clap), clap.hidden_size, config)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, freeze: bool = True) -> Self:
        """Return a tower with the weights of a directory with a CLAP model, whole or audio only, in safetensors.

        Raises:
            ValueError: The directory does not hold an intact one, or it has fusion or another geometry.
        """
        directory = Path(path)
        clap = load_config(directory, ClapAudioConfig, ("clap", "clap_audio_model"), "a CLAP model")
        stored = plain_settings(clap, tuple(name for name, _ in cls.GEOMETRY))
        for name, value in cls.GEOMETRY:
            if stored[name] != value:
                raise ValueError(f"{checkpoint_name(directory)} must have {name} {value}, got {stored[name]}")
        tensors = read_tensors(directory, _name_in_encoder)
        settings = plain_settings(clap, cls.SETTINGS)
        tower = outline(lambda: cls(**settings, freeze=freeze), directory, CLAP)
        described, counted = list(clap.depths), _depths(tensors)
        depths = f"; its config.json has depths {described}, its tensors {counted}"
        fill(tower.encoder, tensors, directory, CLAP, advice=depths if counted and counted != described else "")
        return tower._adopt(tower.encoder)

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> ClapFeatures:
        """Return LAION's features; no setting of the tower changes them."""
        return ClapFeatures()

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Leave the encoder as it is: transformers has one way for windows with relative positions, "eager".

        Raises:
            ValueError: Another one is asked for.
        """
        if attn_implementation != "eager":
            raise ValueError('CLAP has "eager" alone')

    def _encode(self, input_features: Tensor) -> Tensor:
        grid: Tensor = self.encoder(input_features).last_hidden_state  # (B, width, 2 bands, 32 steps)
        return grid.permute(0, 3, 2, 1).flatten(1, 2)


def _name_in_encoder(key: str) -> str | None:
    """Return a stored tensor's name in `ClapAudioModel`, None for those of the model around it."""
    if key.startswith(NOT_THE_ENCODER):
        return None
    return key.removeprefix("encoder.").removeprefix("audio_model.")


def _depths(names: Iterable[str]) -> list[int]:
    """Return how many blocks each stage has, by the tensors' names."""
    blocks = {
        match.groups() for name in names if (match := re.match(r"audio_encoder\.layers\.(\d+)\.blocks\.(\d+)\.", name))
    }
    stages = [int(stage) for stage, _ in blocks]
    return [stages.count(stage) for stage in sorted(set(stages))]
