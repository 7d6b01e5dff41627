"""CLAP's encoder: transformers' states in time-major order, from every published layout of its weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.towers import SMALL_TOWERS, clap_checkpoint, clip
from transformers import ClapAudioModel, ClapAudioModelWithProjection, ClapFeatureExtractor, ClapModel

from palkernels.model import ClapTower, Tower


def test_states_are_those_of_transformers_time_major(tmp_path: Path) -> None:
    """State 2 * t + f is transformers' last_hidden_state[:, :, f, t], with LAION's settings by hand."""
    model = clap_checkpoint(tmp_path)
    tower = ClapTower.from_checkpoint(tmp_path)
    waveform = clip(100_000)
    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14_000, truncation="rand_trunc")
    features = extractor(waveform.numpy(), sampling_rate=48_000, return_tensors="pt").input_features.float()
    with torch.no_grad():
        grid = model.audio_model(features).last_hidden_state
    assert grid.shape == (1, 64, 2, 32)
    input_features, lengths = tower.features([waveform])
    states = tower(input_features)
    assert torch.equal(states, torch.stack([grid[:, :, f, t] for t in range(32) for f in range(2)], dim=1))
    assert lengths.tolist() == [2 * 7]


def test_order_is_time_then_frequency(towers: dict[str, Tower]) -> None:
    """What sounds in one step of 312.5 ms and one half of the mel bins moves the state of that step and band most."""
    tower = towers["clap"]
    noise = torch.randn(1, 1, 1001, 64, generator=torch.Generator().manual_seed(0))
    still = tower(noise)
    for step, band in [(0, 0), (7, 1), (16, 0), (25, 1), (31, 1)]:
        changed = noise.clone()
        changed[:, :, round(31.25 * step) + 4 : round(31.25 * (step + 1)) - 4, 32 * band + 4 : 32 * band + 28] *= -1
        moved = (tower(changed) - still)[0].norm(dim=-1)
        assert int(moved.argmax()) == 2 * step + band


@pytest.mark.parametrize("kind", [ClapModel, ClapAudioModel, ClapAudioModelWithProjection])
def test_checkpoint_layouts(tmp_path: Path, kind: Any) -> None:
    """The whole model loads, and its audio half with or without the projection; float16 becomes float32."""
    clap_checkpoint(tmp_path, kind)
    tower = ClapTower.from_checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert tower.config == {**ClapTower(**SMALL_TOWERS["clap"]).config}
    prefix = "" if kind is ClapAudioModel else "audio_model."
    for name, tensor in tower.encoder.state_dict().items():
        assert torch.equal(tensor, stored[prefix + name])
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    assert next(ClapTower.from_checkpoint(tmp_path).parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_fusion": True}, "must have enable_fusion False, got True"),
        ({"spec_size": 512}, "must have spec_size 256, got 512"),
        ({"depths": [1, 1, 1], "num_attention_heads": [1, 2, 2]}, "must describe a CLAP audio encoder, got "),
        ({"depths": [1, 1, 1, 1]}, "must hold every tensor of a CLAP audio encoder and no other, got 18 unexpected"),
        ({"depths": [1, 1, 3, 1]}, "must hold every tensor of a CLAP audio encoder, got 18 missing"),
        ({"patch_embeds_hidden_size": 16}, "must hold audio_encoder."),
        ({"mlp_ratio": "much"}, "must hold a valid config.json, got "),
    ],
)
def test_refuses_a_config_that_does_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Fusion and other geometries are refused too: their states would mean something else."""
    clap_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["audio_config"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{re.escape(f'checkpoint {str(tmp_path)!r} {message}')}") as caught:
        ClapTower.from_checkpoint(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
