"""SSLAM's encoder: a ViT over patches of a spectrogram, the loader of its published weights, and its tower.

The network is EAT's (arXiv 2401.03497), which follows AudioMAE and data2vec 2.0; SSLAM (ICLR 2025) trains it on
mixtures, so that the weights of both load. In order:

    patches    16 frames x 16 mel bins of (1024, 128), a linear map: 64 time x 8 frequency, time-major, 512 tokens
    positions  fixed sines and cosines of the frequency index (first half of the width) and of the time index
    CLS        a learned token before them, without a position
    norm       LayerNorm, eps 1e-6
    blocks     x = norm1(x + attention(x));  x = norm2(x + mlp(x)): post-norm, biases everywhere, exact GELU

Tensors are named as in the Hugging Face ports of both, less their "model." in front.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from palkernels.errors import one_line
from palkernels.model.audio.features import SslamFeatures
from palkernels.model.encoders.base import Tower
from palkernels.model.encoders.layouts import SSLAM, layout_advice
from palkernels.model.encoders.weights import checkpoint_name, fill, outline, read_json, read_tensors

__all__ = ["SslamEncoder", "SslamTower", "load_sslam"]

FRAMES, MEL_BINS, PATCH = 1_024, 128, 16
TIME, FREQUENCY = FRAMES // PATCH, MEL_BINS // PATCH  # the grid of patches
EPS = 1e-6
HEAD_WIDTH = 64  # of every published size
ATTENTION = ("sdpa", "eager")

# Settings of a published config.json that change what the weights mean, and the one value that this network has.
REQUIRED_SETTINGS = {
    "patch_size": PATCH,
    "stride": PATCH,
    "in_chans": 1,
    "mel_bins": MEL_BINS,
    "norm_eps": EPS,
    "qkv_bias": True,
    "layer_norm_first": False,
    "fixed_positions": True,
}

FAIRSEQ_NORM = "context_encoder.norm."  # fairseq's name for pre_norm
# What the training of EAT and SSLAM leaves in a checkpoint beside the encoder: the teacher, decoders and projections
# of its losses, and a classifier's head. Tensors under these names are not read.
SKIPPED = ("_ema", "decoder", "shared_decoder", "recon_proj", "cls_proj", "center", "fc_norm", "head")


class SslamEncoder(nn.Module):
    """The network of SSLAM and EAT. Published sizes: (768, 12, 12), EAT-large (1024, 24, 16).

    Args:
        hidden_size: Width, a multiple of 4 and of `num_heads`.
        num_layers: Blocks.
        num_heads: Attention heads.

    Raises:
        ValueError: An argument is no positive integer, or the width is no multiple of 4 and of `num_heads`.
    """

    def __init__(self, hidden_size: int = 768, num_layers: int = 12, num_heads: int = 12) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of 4 and of num_heads {num_heads}, got {hidden_size}")
        self.sizes = sizes
        self.config = PreTrainedConfig(attn_implementation="sdpa")  # how the blocks attend, as in transformers' models
        self.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(1, hidden_size, PATCH, stride=PATCH)})
        self.fixed_positional_encoder = Positions(hidden_size)
        self.extra_tokens = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.reset_parameters()
        self.pre_norm = nn.LayerNorm(hidden_size, EPS)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, self.config) for _ in range(num_layers))

    def reset_parameters(self) -> None:
        """Draw the CLS token."""
        init.normal_(self.extra_tokens, std=0.02)

    def forward(self, input_features: Tensor) -> Tensor:
        """(B, 1024 frames, 128 mel bins) to (B, 1 + 512, hidden_size): CLS, then the tokens, time-major."""
        x: Tensor = self.local_encoder["proj"](input_features[:, None])  # (B, hidden_size, 64, 8)
        x = self.fixed_positional_encoder(x.flatten(2).transpose(1, 2))
        x = self.pre_norm(torch.cat([self.extra_tokens.expand(len(x), -1, -1), x], dim=1))
        for block in self.blocks:
            x = block(x)
        return x


class Positions(nn.Module):
    """Fixed sines and cosines, (1, 512, width), which are added to the tokens (B, 512, width).

    They are saved with the weights: a buffer that is not would be lost when a model is built without memory and filled.
    """

    positions: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positions", torch.empty(1, TIME * FREQUENCY, width, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Compute the sines and cosines."""
        init.copy_(self.positions, _positions(self.positions.shape[-1]))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.positions.to(tokens.dtype)  # from_pretrained(dtype=...) leaves buffers as saved


class Block(nn.Module):
    """A post-norm transformer block, (B, N, width) to the same."""

    def __init__(self, width: int, heads: int, config: PreTrainedConfig) -> None:
        super().__init__()
        self.attn = Attention(width, heads, config)
        self.norm1 = nn.LayerNorm(width, EPS)
        layers = OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(layers)
        self.norm2 = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        x = self.norm2(x + self.mlp(x))
        return x


class Attention(nn.Module):
    """Self-attention over all tokens, without a mask."""

    def __init__(self, width: int, heads: int, config: PreTrainedConfig) -> None:
        super().__init__()
        self.heads = heads
        self.config = config
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, head width)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if self.config._attn_implementation == "eager":
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            x = scores.softmax(-1) @ value
        else:
            x = nn.functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return output


def _positions(width: int) -> Tensor:
    """Return (1, 512, width): sines and cosines of the frequency index, then of the time index, a quarter each."""
    with torch.device("cpu"):  # whatever the default is: on the meta device there would be no values
        rates = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        time, frequency = torch.meshgrid(torch.arange(TIME), torch.arange(FREQUENCY), indexing="ij")
        angles = [index.reshape(-1, 1) * rates for index in (frequency, time)]
        return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()[None]


def load_sslam(path: Path) -> SslamEncoder:
    """Return the encoder of a checkpoint of SSLAM or EAT, float32 on the CPU.

    Args:
        path: A directory as the Hugging Face ports have it (config.json and safetensors), a safetensors file, or
            a .pt or .pth file as fairseq writes it. The last is read with `weights_only=True`: tensors and plain
            values, never code. Pretrained and fine-tuned layouts are known, with and without the ports' names.
            Without a config.json that says otherwise, heads are 64 wide.

    Raises:
        ValueError: The checkpoint is none of these; a tensor of the encoder is missing or has another shape; or a
            tensor is there that neither the encoder nor `SKIPPED` has.
    """
    checkpoint = checkpoint_name(path)
    if not path.exists():
        raise ValueError(f"{checkpoint} must be an existing directory or file, got none there")
    pickled = path.suffix in (".pt", ".pth") and path.is_file()
    tensors = _read_pickled(path) if pickled else read_tensors(path, _name_in_encoder)
    cls, positions = tensors.get("extra_tokens"), tensors.get("fixed_positional_encoder.positions")
    if cls is None or cls.ndim != 3 or positions is None:
        stored = f"{len(tensors)} tensors, the first {', '.join(map(repr, sorted(tensors)[:3]))}" if tensors else "none"
        own = "; they are a tower's state_dict, which load_state_dict of a tower with its config takes"
        advice = own if "encoder.extra_tokens" in tensors else layout_advice(tensors, SSLAM)
        raise ValueError(
            f"{checkpoint} must hold extra_tokens (1, 1, width) and positions of {SSLAM}, got {stored}{advice}"
        )
    width = cls.shape[-1]
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    heads = _settings(path).get("num_heads", width // HEAD_WIDTH)
    encoder = outline(lambda: SslamEncoder(width, layers, heads), path, SSLAM)
    # Positions are stored for longer clips too, 8 to a step of time. Only a grid 8 frequencies wide has these values:
    # those of another grid would load and mean something else.
    expected = _positions(width)
    if positions.ndim == 3 and positions.shape[1] > expected.shape[1]:
        positions = positions[:, : expected.shape[1]]
    if positions.shape == expected.shape and not torch.allclose(positions.float(), expected, rtol=0, atol=0.01):
        raise ValueError(f"{checkpoint} must hold the positions of a grid {FREQUENCY} frequencies wide, got others")
    tensors["fixed_positional_encoder.positions"] = positions
    fill(encoder, tensors, path, SSLAM, f"to fit extra_tokens of width {width}")
    return encoder


def _name_in_encoder(key: str) -> str | None:
    """Return a stored tensor's name in `SslamEncoder`, None for what is no part of the encoder."""
    name = key.removeprefix("model.").removeprefix("modality_encoders.IMAGE.")
    if name.split(".")[0] in SKIPPED:
        return None
    return f"pre_norm.{name.removeprefix(FAIRSEQ_NORM)}" if name.startswith(FAIRSEQ_NORM) else name


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Return a .pt file's tensors by their names in `SslamEncoder`."""
    checkpoint = checkpoint_name(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no such file make torch raise
        raise ValueError(
            f"{checkpoint} must load with torch.load(weights_only=True); if you trust it, store its tensors as "
            f"safetensors; got {one_line(error, with_type=True)[:200]}"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # fairseq's, beside its settings
        content = content["model"]
    if not isinstance(content, dict):
        raise ValueError(f"{checkpoint} must hold a state dict, got {type(content).__name__}")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        name = _name_in_encoder(str(key))
        if name is None:
            continue
        if not isinstance(value, Tensor) or name in tensors:
            got = "it twice" if name in tensors else type(value).__name__
            raise ValueError(f"{checkpoint} must hold {name} once, as a tensor, got {got}")
        tensors[name] = value
    return tensors


def _settings(path: Path) -> dict[str, Any]:
    """Return the directory's config.json, or {} if there is none.

    Raises:
        ValueError: It describes another network.
    """
    if not (path / "config.json").is_file():
        return {}
    try:
        settings = read_json(path / "config.json")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{checkpoint_name(path)} must hold a readable config.json, got {one_line(error, with_type=True)}"
        ) from error
    for name, value in REQUIRED_SETTINGS.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{checkpoint_name(path)} must have {name} {json.dumps(value)}, got {settings[name]!r}")
    return settings


class SslamTower(Tower):
    """SSLAM's encoder as a part of a model.

    The states are the last block's, time-major: state 8 * t + f is band f of step t, f = 0 the lowest.

    Args:
        hidden_size: Width.
        num_layers: Blocks.
        num_heads: Attention heads.
        with_cls: Whether the CLS token comes before the others as a state of its own; it counts as valid.
        seed: Seed of the random weights.
        freeze: Whether the weights stay as they are in training; see `Tower`.

    Raises:
        ValueError: A size is no positive integer, or `hidden_size` is no multiple of 4 and of `num_heads`.
    """

    layout = SSLAM

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
        config = {**sizes, "with_cls": with_cls, "seed": seed, "freeze": freeze}
        super().__init__(lambda: SslamEncoder(**sizes), hidden_size, config)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, with_cls: bool = False, freeze: bool = True) -> Self:
        """Return a tower with the weights of SSLAM or EAT: a directory, a safetensors file, or fairseq's .pt.

        Raises:
            ValueError: `load_sslam` refuses the checkpoint.
        """
        encoder = load_sslam(Path(path))
        with torch.device("meta"):
            tower = cls(**encoder.sizes, with_cls=with_cls, freeze=freeze)
        return tower._adopt(encoder)

    @classmethod
    def make_features(cls, config: dict[str, Any]) -> SslamFeatures:
        """Return the filter-bank features, the CLS token counted if the tower has it."""
        return SslamFeatures(config.get("with_cls", False))

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Let the blocks attend by "sdpa" or "eager".

        Raises:
            ValueError: Another one is asked for.
        """
        if attn_implementation not in ATTENTION:
            raise ValueError('SSLAM has "sdpa" and "eager"')
        config: Any = self.encoder.config
        config._attn_implementation = attn_implementation

    def _encode(self, input_features: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_features)
        return states if self.config["with_cls"] else states[:, 1:]
