"""What every encoder has as a part of a model: states of a batch, frozen weights, a config that rebuilds it."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.towers import SMALL_TOWERS, clap_checkpoint, clip, equal, weights, whisper_checkpoint
from torch import nn
from transformers import ClapAudioConfig, ClapAudioModel, PreTrainedConfig, PreTrainedModel

from palkernels.model import TOWERS, WHISPER_SIZES, ClapTower, SslamTower, Tower, WhisperAudioEncoder, WhisperTower

WIDTHS = {"whisper": 32, "clap": 64, "sslam": 32}
STATES = {"whisper": 1500, "clap": 64, "sslam": 512}
each = pytest.mark.parametrize("name", TOWERS)


@each
def test_batch_of_any_lengths_is_its_clips_alone(towers: dict[str, Tower], name: str) -> None:
    """States have the stated shapes, and a clip's valid states do not depend on its batch."""
    tower = towers[name]
    clips = [clip(samples, seed=samples) for samples in (70_000, 321, tower.features.max_samples)]
    input_features, lengths = tower.features(clips)
    states = tower(input_features)
    assert states.shape == (3, STATES[name], WIDTHS[name])
    assert tower.hidden_size == WIDTHS[name]
    assert tower.sampling_rate == {"whisper": 16_000, "clap": 48_000, "sslam": 16_000}[name]
    assert lengths[2] == STATES[name] == tower.features.num_states
    for at, waveform in enumerate(clips):
        alone, length = tower.features([waveform])
        valid = int(length[0])
        assert valid == lengths[at]
        torch.testing.assert_close(states[at, :valid], tower(alone)[0, :valid], rtol=1e-4, atol=1e-5)


@each
def test_computes_in_the_weights_dtype(towers: dict[str, Tower], name: str) -> None:
    """Features stay float32; the tower casts them."""
    tower = copy.deepcopy(towers[name]).to(torch.bfloat16)
    input_features, _ = tower.features([clip(9_000)])
    states = tower(input_features)
    assert states.dtype == torch.bfloat16
    torch.testing.assert_close(states.float(), towers[name](input_features), rtol=0, atol=0.2)


@each
def test_refuses_features_of_another_shape(towers: dict[str, Tower], name: str) -> None:
    """Features of another shape, such as another encoder's, are refused."""
    for shape in [(1, 10), (2, *towers[name].features.shape[:-1], 7), towers[name].features.shape[1:]]:
        with pytest.raises(
            ValueError, match=rf"^input_features must have shape \(B, .*\), got {re.escape(str(shape))}"
        ):
            towers[name](torch.zeros(shape))


@each
def test_frozen_inside_a_model_that_trains(towers: dict[str, Tower], name: str) -> None:
    """A frozen tower has no gradients and stays in evaluation mode; a connector behind it trains."""
    tower = towers[name]
    outer = nn.ModuleDict({"tower": tower, "connector": nn.Linear(WIDTHS[name], 4)}).train()
    assert outer["connector"].training
    assert not any(module.training for module in tower.modules())
    assert not any(weight.requires_grad for weight in tower.parameters())
    before = copy.deepcopy(weights(tower))
    input_features, _ = tower.features([clip(9_000)])
    states = tower(input_features)
    outer["connector"](states).sum().backward()
    assert outer["connector"].weight.grad is not None
    assert not states.requires_grad
    assert equal(weights(tower), before)  # no running statistics either


@each
def test_trainable_if_asked(name: str) -> None:
    """An unfrozen tower has gradients and follows the mode of the model around it."""
    tower = TOWERS[name](**SMALL_TOWERS[name], freeze=False)
    nn.ModuleDict({"tower": tower}).train()
    assert all(module.training for module in tower.modules())
    tower(tower.features([clip(9_000)])[0]).square().sum().backward()
    assert all(weight.grad is not None for weight in tower.parameters() if weight.requires_grad)
    assert sum(weight.requires_grad for weight in tower.parameters()) > 10
    assert not any(module.training for module in tower.eval().modules())


@each
def test_seed_decides_the_weights(towers: dict[str, Tower], name: str) -> None:
    """The global random state does not matter, and stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        before = torch.get_rng_state(), numpy.random.get_state()[1].copy()
        same, other = TOWERS[name](**SMALL_TOWERS[name]), TOWERS[name](**SMALL_TOWERS[name], seed=7)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert numpy.array_equal(numpy.random.get_state()[1], before[1])
    assert equal(weights(same), weights(towers[name]))
    assert not equal(weights(other), weights(towers[name]))


def test_defaults_are_the_published_sizes() -> None:
    """The defaults are Whisper tiny, LAION's HTSAT-tiny and SSLAM base; `WHISPER_SIZES` holds arguments."""
    with torch.device("meta"):
        sizes = {name: sum(weight.numel() for weight in TOWERS[name]().parameters()) for name in TOWERS}
        large = WhisperTower(**WHISPER_SIZES["large-v3"])
        clap = ClapAudioModel(ClapAudioConfig())
    assert sizes["whisper"] == 8_208_384
    assert sizes["clap"] == sum(weight.numel() for weight in clap.parameters())
    assert sizes["sslam"] == 85_254_144
    assert (large.hidden_size, large.features.shape) == (1280, (128, 3000))
    assert equal(weights(WhisperTower()), weights(WhisperAudioEncoder.build("tiny")))


@each
def test_round_trip_through_config_and_state_dict(name: str) -> None:
    """A JSON config and a state dict make the same tower; the config alone makes the same features."""
    tower = TOWERS[name](**SMALL_TOWERS[name], seed=5, freeze=False).eval()
    config = json.loads(json.dumps(tower.config))
    assert config == tower.config
    again = TOWERS[name](**config)
    assert equal(weights(again), weights(tower))  # the seed is in it
    again = TOWERS[name](**config | {"seed": 0, "freeze": True})
    again.load_state_dict(tower.state_dict())
    input_features, lengths = TOWERS[name].make_features(config)([clip(9_000)])
    assert torch.equal(again(input_features), tower(input_features).detach())
    assert torch.equal(lengths, tower.features([clip(9_000)])[1])


@each
def test_without_memory_under_meta(towers: dict[str, Tower], name: str) -> None:
    """A tower can be built without memory and then filled, as large models are."""
    with torch.device("meta"):
        tower = TOWERS[name](**SMALL_TOWERS[name])
    assert all(tensor.is_meta for tensor in weights(tower).values())
    tower.load_state_dict(towers[name].state_dict(), assign=True)
    input_features, _ = tower.features([clip(9_000)])
    assert torch.equal(tower(input_features), towers[name](input_features))
    assert not any(weight.requires_grad for weight in tower.parameters())


class OuterConfig(PreTrainedConfig):
    model_type = "tower_test"

    def __init__(self, tower: str = "sslam", settings: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.tower, self.settings = tower, settings or {}
        super().__init__(**kwargs)


class Outer(PreTrainedModel):
    config_class = OuterConfig

    def __init__(self, config: OuterConfig) -> None:
        super().__init__(config)
        self.audio_tower = TOWERS[config.tower](**config.settings)
        self.connector = nn.Linear(self.audio_tower.hidden_size, 4)
        self.post_init()


@each
def test_inside_a_transformers_model(towers: dict[str, Tower], tmp_path: Path, name: str) -> None:
    """The model's initialisation leaves the tower's weights alone; save_pretrained and from_pretrained keep them."""
    outer = Outer(OuterConfig(name, {**SMALL_TOWERS[name], "seed": 0}))
    assert equal(weights(outer.audio_tower), weights(towers[name]))
    outer.audio_tower.load_state_dict(TOWERS[name](**SMALL_TOWERS[name], seed=3).state_dict())
    outer.save_pretrained(tmp_path)
    again = Outer.from_pretrained(tmp_path)
    assert equal(weights(again.audio_tower), weights(outer.audio_tower))
    input_features, _ = again.audio_tower.features([clip(9_000)])
    assert torch.equal(again.audio_tower(input_features), outer.audio_tower(input_features))


@pytest.mark.parametrize("name", ["whisper", "clap"])
def test_checkpoint_tower_is_frozen_or_not_and_rebuilds(tmp_path: Path, name: str) -> None:
    """A tower of a checkpoint freezes and rebuilds as one with random weights does."""
    {"whisper": whisper_checkpoint, "clap": clap_checkpoint}[name](tmp_path)
    tower = TOWERS[name].from_checkpoint(str(tmp_path))
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert not any(weight.requires_grad for weight in tower.parameters())
    assert any(weight.requires_grad for weight in TOWERS[name].from_checkpoint(tmp_path, freeze=False).parameters())
    again = TOWERS[name](**json.loads(json.dumps(tower.config)))
    again.load_state_dict(tower.state_dict())
    assert equal(weights(again), weights(tower))


def test_refuses_another_models_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of another model is refused, and so are pickled weights."""
    whisper_checkpoint(tmp_path / "whisper")
    with pytest.raises(
        ValueError, match=r"must hold a CLAP model, got model_type 'whisper', which WhisperTower reads$"
    ):
        ClapTower.from_checkpoint(tmp_path / "whisper")
    with pytest.raises(ValueError, match=r"must hold extra_tokens .* and positions of an SSLAM encoder, got "):
        SslamTower.from_checkpoint(tmp_path / "whisper")
    clap_checkpoint(tmp_path / "clap")
    with pytest.raises(ValueError, match=r"must hold a Whisper model, got model_type 'clap', which ClapTower reads$"):
        WhisperTower.from_checkpoint(tmp_path / "clap")
    with pytest.raises(ValueError, match=r"must be an existing directory, got none there$"):
        ClapTower.from_checkpoint("laion/clap-htsat-unfused")
    shutil.move(tmp_path / "clap" / "model.safetensors", tmp_path / "clap" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold safetensors weights"):
        ClapTower.from_checkpoint(tmp_path / "clap")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("whisper", {"width": 3}, "settings must be among d_model, "),
        ("whisper", {"d_model": "wide"}, "settings must be those of WhisperConfig, got "),
        ("clap", {"spec_size": 512}, "settings must be among patch_embeds_hidden_size, "),
        ("clap", {"depths": [1, 1]}, "depths must have 4 entries, got [1, 1]"),
        ("sslam", {"num_heads": 5}, "hidden_size must be a multiple of 4 and of num_heads 5, got 768"),
        ("sslam", {"with_cls": 1}, "with_cls must be True or False, got 1"),
        *((name, {"seed": -1}, "seed must be an integer from 0 to 2**63 - 1, got -1") for name in TOWERS),
        *((name, {"freeze": "no"}, "freeze must be True or False, got 'no'") for name in TOWERS),
    ],
)
def test_constructor_arguments(name: str, settings: dict[str, Any], message: str) -> None:
    """Wrong arguments are refused in one line."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        TOWERS[name](**settings)
    assert len(str(caught.value).splitlines()) == 1


@each
def test_weights_that_a_checkpoint_lacks_are_the_seeds(towers: dict[str, Tower], name: str) -> None:
    """A tower built without memory draws what its constructor draws; what transformers marks as loaded is kept."""
    with torch.device("meta"):
        tower = TOWERS[name](**SMALL_TOWERS[name])
    tower.to_empty(device="cpu")
    loaded = next(tower.parameters())
    with torch.no_grad():
        for tensor in (*tower.parameters(), *tower.buffers()):
            tensor.fill_(7)
    loaded._is_hf_initialized = True  # type: ignore[attr-defined]
    state = torch.get_rng_state()
    tower.reset_parameters()
    assert torch.equal(torch.get_rng_state(), state)
    assert bool((loaded == 7).all())
    with torch.no_grad():
        loaded.copy_(next(towers[name].parameters()))
    assert equal(weights(tower), weights(towers[name]))
    for found, wanted in zip(tower.buffers(), towers[name].buffers(), strict=True):
        assert torch.equal(found, wanted)
