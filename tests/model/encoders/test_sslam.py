"""SSLAM's encoder: the network written out again in einsums, and its tower."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.sslam import HEADS, LAYERS, WIDTH, by_formula
from support.towers import SMALL_TOWERS, clip, equal, weights
from torch import Tensor

from palkernels.model import SslamTower, Tower
from palkernels.model.encoders.sslam import SslamEncoder


def spectrogram(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1024, 128, generator=torch.Generator().manual_seed(seed))


def restated(state: dict[str, Tensor], spectrogram: Tensor, heads: int) -> Tensor:
    """The network's definition, from the tensors' published names, in the state's dtype."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return centred * scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]

    batch = len(spectrogram)
    patches = spectrogram.view(batch, 64, 16, 8, 16)  # time, frame in patch, frequency, bin in patch
    x = torch.einsum("btifj,oij->btfo", patches, state["local_encoder.proj.weight"][:, 0])
    x = x.reshape(batch, 512, -1) + state["local_encoder.proj.bias"]
    width = x.shape[-1]
    x = x + by_formula(width).to(x.dtype)
    x = norm(torch.cat([state["extra_tokens"].expand(batch, 1, width), x], 1), "pre_norm")
    for layer in range(len([name for name in state if name.endswith("attn.qkv.weight")])):
        block = f"blocks.{layer}"
        query, key, value = linear(x, f"{block}.attn.qkv").split(width, -1)
        out = []
        for head in range(heads):
            columns = slice(head * width // heads, (head + 1) * width // heads)
            scores = torch.einsum("bqd,bkd->bqk", query[..., columns], key[..., columns]) * (width // heads) ** -0.5
            out.append(torch.einsum("bqk,bkd->bqd", scores.softmax(-1), value[..., columns]))
        x = norm(x + linear(torch.cat(out, -1), f"{block}.attn.proj"), f"{block}.norm1")
        hidden = linear(x, f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = norm(x + linear(hidden, f"{block}.mlp.fc2"), f"{block}.norm2")
    return x


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_network_is_the_definition_in_float64(encoder: SslamEncoder, attn_implementation: str) -> None:
    """Patches, positions, CLS and post-norm blocks are exact in float64."""
    double = SslamEncoder(WIDTH, LAYERS, HEADS).double().eval()
    double.config._attn_implementation = attn_implementation
    state = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    state["fixed_positional_encoder.positions"] = by_formula(WIDTH)[None]
    double.load_state_dict(state)
    x = spectrogram(2).double()
    torch.testing.assert_close(double(x), restated(state, x, HEADS), rtol=1e-10, atol=1e-10)


def test_network_in_float32(encoder: SslamEncoder) -> None:
    """float32 is close to the definition, with CLS before 512 tokens."""
    x = spectrogram(1, seed=1)
    state = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    states = encoder(x)
    assert states.shape == (1, 513, WIDTH)
    torch.testing.assert_close(states.double(), restated(state, x.double(), HEADS), rtol=0, atol=1e-4)


def test_token_stands_on_its_patch() -> None:
    """Token 8 * t + f reads 16 frames from 16 t and 16 bins from 16 f, as the blocks' input shows."""
    encoder = SslamEncoder(WIDTH, 1, HEADS)
    patches: list[Tensor] = []
    encoder.pre_norm.register_forward_pre_hook(lambda module, inputs: patches.append(inputs[0]))
    quiet = spectrogram(1)
    loud = quiet.clone()
    loud[0, 16 * 5 + 3, 16 * 2 + 7] += 1
    encoder(quiet), encoder(loud)
    changed = (patches[0] != patches[1]).any(-1)[0].nonzero().flatten()
    assert changed.tolist() == [1 + 8 * 5 + 2]


def test_published_size() -> None:
    """EAT-base and SSLAM have 85,254,144 trained weights beside the positions."""
    with torch.device("meta"):
        encoder = SslamEncoder()
    assert sum(weight.numel() for weight in encoder.parameters()) == 85_254_144


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "hidden_size must be a positive integer, got 0"),
        ((8, 1.0, 1), "num_layers must be a positive integer, got 1.0"),
        ((8, 1, True), "num_heads must be a positive integer, got True"),
        ((8, 1, 3), "hidden_size must be a multiple of 4 and of num_heads 3, got 8"),
        ((6, 1, 3), "hidden_size must be a multiple of 4 and of num_heads 3, got 6"),
    ],
)
def test_sizes(sizes: tuple[Any, Any, Any], message: str) -> None:
    """Wrong sizes are refused before anything is built."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SslamEncoder(*sizes)


def test_states_leave_cls_out_unless_asked(towers: dict[str, Tower]) -> None:
    """With CLS, it comes first and counts as valid."""
    tower = towers["sslam"]
    with_cls = SslamTower(**SMALL_TOWERS["sslam"], with_cls=True)
    input_features, lengths = tower.features([clip(50_000)])
    _, one_more = with_cls.features([clip(50_000)])
    states = with_cls(input_features)
    assert states.shape == (1, 513, 32)
    assert torch.equal(states[:, 1:], tower(input_features))
    assert torch.equal(states, tower.encoder(input_features))
    assert one_more.tolist() == [int(lengths[0]) + 1]


def test_tower_of_a_checkpoint(tmp_path: Path) -> None:
    """A tower takes the weights of a file with the Hugging Face port's names."""
    tower = SslamTower(hidden_size=64, num_layers=1, num_heads=1, seed=4)
    save_file(
        {f"model.{name}": tensor for name, tensor in tower.encoder.state_dict().items()}, tmp_path / "a.safetensors"
    )
    loaded = SslamTower.from_checkpoint(tmp_path / "a.safetensors", with_cls=True)
    assert equal(weights(loaded), weights(tower))
    assert loaded.config == {**tower.config, "with_cls": True, "seed": 0}
    assert not any(weight.requires_grad for weight in loaded.parameters())
