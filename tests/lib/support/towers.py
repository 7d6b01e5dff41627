"""Small encoders, and checkpoints of the models that published encoders come in."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ClapConfig, ClapModel, WhisperConfig, WhisperForConditionalGeneration

from palkernels.model import Tower

# Settings of each tower.
SMALL_TOWERS: dict[str, dict[str, Any]] = {
    "whisper": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 128,
    },
    "clap": {"patch_embeds_hidden_size": 8, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 2, 4]},
    "sslam": {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
}
# A whole Whisper around that tower, small enough to be written and read many times.
SMALL_WHISPER = WhisperConfig(
    **SMALL_TOWERS["whisper"],
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=64,
    vocab_size=40,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
)


def clip(samples: int, seed: int = 0) -> Tensor:
    """(samples,) of noise over a rising tone."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.arange(samples) / samples
    return 0.1 * torch.randn(samples, generator=generator) + 0.3 * torch.sin(4000 * ramp**2)


def weights(tower: Tower) -> dict[str, Tensor]:
    state: dict[str, Tensor] = tower.state_dict()
    return state


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def small_whisper() -> Any:
    """A whole Whisper with weights from a seed, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return WhisperForConditionalGeneration(SMALL_WHISPER).eval()


def whisper_checkpoint(path: Path) -> Any:
    """Write a checkpoint of a whole Whisper and return the model."""
    model = small_whisper()
    model.save_pretrained(path)
    return model


def clap_checkpoint(path: Path, kind: Any = ClapModel, **settings: Any) -> Any:
    """Write a checkpoint of a CLAP model, whole or one of its audio classes, and return the model."""
    audio = SMALL_TOWERS["clap"] | {"hidden_size": 64} | settings
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config: Any = ClapConfig(text_config=text | {"vocab_size": 40}, audio_config=audio)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config if kind is ClapModel else config.audio_config).eval()
        for weight in model.parameters():  # biases and tables that are drawn as zeros
            nn.init.normal_(weight, std=0.2)
    model.save_pretrained(path)
    return model
