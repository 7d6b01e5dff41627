"""Whisper, CLAP and SSLAM as parts of a model: transformers' states, frozen, rebuilt from JSON and a state dict."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    ClapAudioConfig,
    ClapAudioModel,
    ClapAudioModelWithProjection,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from palkernels.model.encoders.towers import TOWERS, ClapTower, SslamTower, Tower, WhisperTower
from palkernels.model.encoders.whisper import WHISPER_SIZES, WhisperAudioEncoder

SMALL: dict[str, dict[str, Any]] = {
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
WIDTHS = {"whisper": 32, "clap": 64, "sslam": 32}
STATES = {"whisper": 1500, "clap": 64, "sslam": 512}
each = pytest.mark.parametrize("name", TOWERS)


@pytest.fixture(scope="module")
def towers() -> dict[str, Tower]:
    return {name: TOWERS[name](**SMALL[name]) for name in TOWERS}


def clip(samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.arange(samples) / samples
    return 0.1 * torch.randn(samples, generator=generator) + 0.3 * torch.sin(4000 * ramp**2)


def weights(tower: Tower) -> dict[str, Tensor]:
    state: dict[str, Tensor] = tower.state_dict()
    return state


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The states


@each
def test_batch_of_any_lengths_is_its_clips_alone(towers: dict[str, Tower], name: str) -> None:
    """Shapes as promised, and a clip's valid states do not know what it was batched with."""
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


def test_whisper_states_are_those_of_transformers(tmp_path: Path) -> None:
    """Of a whole model's directory: its encoder on its extractor's features, 1500 states."""
    model = whisper_model(tmp_path)
    tower = WhisperTower.from_checkpoint(tmp_path)
    waveform = clip(100_000)
    features = WhisperFeatureExtractor(feature_size=128)(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_encoder()(features.input_features).last_hidden_state
    input_features, lengths = tower.features([waveform])
    assert torch.equal(tower(input_features), expected)
    assert lengths.tolist() == [313]


def test_clap_states_are_those_of_transformers_time_major(tmp_path: Path) -> None:
    """State 2 * t + f is transformers' last_hidden_state[:, :, f, t], with LAION's settings by hand."""
    model = clap_model(tmp_path)
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


def test_clap_order_is_time_then_frequency(towers: dict[str, Tower]) -> None:
    """What sounds in one step of 312.5 ms and one half of the mel bins moves the state of that step and band most."""
    tower = towers["clap"]
    noise = torch.randn(1, 1, 1001, 64, generator=torch.Generator().manual_seed(0))
    still = tower(noise)
    for step, band in [(0, 0), (7, 1), (16, 0), (25, 1), (31, 1)]:
        changed = noise.clone()
        changed[:, :, round(31.25 * step) + 4 : round(31.25 * (step + 1)) - 4, 32 * band + 4 : 32 * band + 28] *= -1
        moved = (tower(changed) - still)[0].norm(dim=-1)
        assert int(moved.argmax()) == 2 * step + band


def test_sslam_states_leave_cls_out_unless_asked(towers: dict[str, Tower]) -> None:
    """With it, it comes first and counts as valid."""
    tower = towers["sslam"]
    with_cls = SslamTower(**SMALL["sslam"], with_cls=True)
    input_features, lengths = tower.features([clip(50_000)])
    _, one_more = with_cls.features([clip(50_000)])
    states = with_cls(input_features)
    assert states.shape == (1, 513, 32)
    assert torch.equal(states[:, 1:], tower(input_features))
    assert torch.equal(states, tower.encoder(input_features))
    assert one_more.tolist() == [int(lengths[0]) + 1]


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
    """Say, another encoder's."""
    for shape in [(1, 10), (2, *towers[name].features.shape[:-1], 7), towers[name].features.shape[1:]]:
        with pytest.raises(
            ValueError, match=rf"^input_features must have shape \(B, .*\), got {re.escape(str(shape))}"
        ):
            towers[name](torch.zeros(shape))


# Frozen


@each
def test_frozen_inside_a_model_that_trains(towers: dict[str, Tower], name: str) -> None:
    """No gradients, evaluation mode; the states can be trained on."""
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
    """Gradients for its weights, and the mode of the model around it."""
    tower = TOWERS[name](**SMALL[name], freeze=False)
    nn.ModuleDict({"tower": tower}).train()
    assert all(module.training for module in tower.modules())
    tower(tower.features([clip(9_000)])[0]).square().sum().backward()
    assert all(weight.grad is not None for weight in tower.parameters() if weight.requires_grad)
    assert sum(weight.requires_grad for weight in tower.parameters()) > 10
    assert not any(module.training for module in tower.eval().modules())


# Weights from a seed


@each
def test_seed_decides_the_weights(towers: dict[str, Tower], name: str) -> None:
    """Whatever the global random state is, which stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        before = torch.get_rng_state(), numpy.random.get_state()[1].copy()
        same, other = TOWERS[name](**SMALL[name]), TOWERS[name](**SMALL[name], seed=7)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert numpy.array_equal(numpy.random.get_state()[1], before[1])
    assert equal(weights(same), weights(towers[name]))
    assert not equal(weights(other), weights(towers[name]))


def test_defaults_are_the_published_sizes() -> None:
    """Whisper tiny, LAION's HTSAT-tiny, SSLAM base; `WHISPER_SIZES` are arguments."""
    with torch.device("meta"):
        sizes = {name: sum(weight.numel() for weight in TOWERS[name]().parameters()) for name in TOWERS}
        large = WhisperTower(**WHISPER_SIZES["large-v3"])
        clap = ClapAudioModel(ClapAudioConfig())
    assert sizes["whisper"] == 8_208_384
    assert sizes["clap"] == sum(weight.numel() for weight in clap.parameters())
    assert sizes["sslam"] == 85_254_144
    assert (large.hidden_size, large.features.shape) == (1280, (128, 3000))
    assert equal(weights(WhisperTower()), weights(WhisperAudioEncoder.build("tiny")))


# Round trips


@each
def test_round_trip_through_config_and_state_dict(name: str) -> None:
    """JSON and tensors are all there is of a tower; without weights, its features."""
    tower = TOWERS[name](**SMALL[name], seed=5, freeze=False).eval()
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
    """As large models are built before they are filled."""
    with torch.device("meta"):
        tower = TOWERS[name](**SMALL[name])
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
    """Its initialisation leaves the tower's weights alone; save_pretrained and from_pretrained keep them."""
    outer = Outer(OuterConfig(name, {**SMALL[name], "seed": 0}))
    assert equal(weights(outer.audio_tower), weights(towers[name]))
    outer.audio_tower.load_state_dict(TOWERS[name](**SMALL[name], seed=3).state_dict())
    outer.save_pretrained(tmp_path)
    again = Outer.from_pretrained(tmp_path)
    assert equal(weights(again.audio_tower), weights(outer.audio_tower))
    input_features, _ = again.audio_tower.features([clip(9_000)])
    assert torch.equal(again.audio_tower(input_features), outer.audio_tower(input_features))


# Checkpoints


def whisper_model(path: Path) -> Any:
    settings = SMALL["whisper"] | {"decoder_layers": 1, "decoder_ffn_dim": 64, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0, "vocab_size": 40}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = WhisperForConditionalGeneration(WhisperConfig(**settings, **tokens)).eval()
    model.save_pretrained(path)
    return model


def clap_model(path: Path, kind: Any = ClapModel, **settings: Any) -> Any:
    audio = SMALL["clap"] | {"hidden_size": 64} | settings
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config: Any = ClapConfig(text_config=text | {"vocab_size": 40}, audio_config=audio)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config if kind is ClapModel else config.audio_config).eval()
        for weight in model.parameters():  # biases and tables that are drawn as zeros
            nn.init.normal_(weight, std=0.2)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("kind", [ClapModel, ClapAudioModel, ClapAudioModelWithProjection])
def test_clap_checkpoint_layouts(tmp_path: Path, kind: Any) -> None:
    """The whole model, or its audio half with or without the projection; float16 becomes float32."""
    clap_model(tmp_path, kind)
    tower = ClapTower.from_checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert tower.config == {**ClapTower(**SMALL["clap"]).config}
    prefix = "" if kind is ClapAudioModel else "audio_model."
    for name, tensor in tower.encoder.state_dict().items():
        assert torch.equal(tensor, stored[prefix + name])
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    save_file(half, tmp_path / "model.safetensors", {"format": "pt"})
    assert next(ClapTower.from_checkpoint(tmp_path).parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["whisper", "clap"])
def test_checkpoint_tower_is_frozen_or_not_and_rebuilds(tmp_path: Path, name: str) -> None:
    """As one with random weights."""
    {"whisper": whisper_model, "clap": clap_model}[name](tmp_path)
    tower = TOWERS[name].from_checkpoint(str(tmp_path))
    tower.train()
    assert not any(module.training for module in tower.modules())
    assert not any(weight.requires_grad for weight in tower.parameters())
    assert any(weight.requires_grad for weight in TOWERS[name].from_checkpoint(tmp_path, freeze=False).parameters())
    again = TOWERS[name](**json.loads(json.dumps(tower.config)))
    again.load_state_dict(tower.state_dict())
    assert equal(weights(again), weights(tower))


def test_sslam_checkpoint(tmp_path: Path) -> None:
    """A tower's own weights, as the Hugging Face port would hold them."""
    tower = SslamTower(hidden_size=64, num_layers=1, num_heads=1, seed=4)
    save_file(
        {f"model.{name}": tensor for name, tensor in tower.encoder.state_dict().items()}, tmp_path / "a.safetensors"
    )
    loaded = SslamTower.from_checkpoint(tmp_path / "a.safetensors", with_cls=True)
    assert equal(weights(loaded), weights(tower))
    assert loaded.config == {**tower.config, "with_cls": True, "seed": 0}
    assert not any(weight.requires_grad for weight in loaded.parameters())


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
def test_refuses_a_clap_config_that_does_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Fusion and other geometries too: their states would be others."""
    clap_model(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["audio_config"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{re.escape(f'checkpoint {str(tmp_path)!r} {message}')}") as caught:
        ClapTower.from_checkpoint(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_refuses_another_models_checkpoint(tmp_path: Path) -> None:
    """And pickled weights."""
    whisper_model(tmp_path / "whisper")
    with pytest.raises(ValueError, match=r"must hold a CLAP model, got model_type 'whisper'$"):
        ClapTower.from_checkpoint(tmp_path / "whisper")
    with pytest.raises(ValueError, match=r"must hold extra_tokens .* and positions of an SSLAM encoder, got "):
        SslamTower.from_checkpoint(tmp_path / "whisper")
    clap_model(tmp_path / "clap")
    with pytest.raises(ValueError, match=r"must hold a Whisper model, got model_type 'clap'$"):
        WhisperTower.from_checkpoint(tmp_path / "clap")
    with pytest.raises(ValueError, match=r"must be an existing directory, got none there$"):
        ClapTower.from_checkpoint("laion/clap-htsat-unfused")
    shutil.move(tmp_path / "clap" / "model.safetensors", tmp_path / "clap" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold safetensors weights"):
        ClapTower.from_checkpoint(tmp_path / "clap")


# Arguments


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
    """Refused in one line."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        TOWERS[name](**settings)
    assert len(str(caught.value).splitlines()) == 1
