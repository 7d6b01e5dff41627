"""SSLAM's encoder: the network written out again in einsums, and a loader that takes the published layouts only."""

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from palkernels.model.encoders.sslam import SslamEncoder, load_sslam

State = dict[str, Any]
WIDTH, LAYERS, HEADS = 128, 2, 2  # heads as wide as the published ones


@pytest.fixture(scope="module")
def encoder() -> SslamEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SslamEncoder(WIDTH, LAYERS, HEADS)
        for name, weight in encoder.named_parameters():  # norms and biases that do something
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(weight, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return encoder.eval().requires_grad_(False)


def spectrogram(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1024, 128, generator=torch.Generator().manual_seed(seed))


# The network


def restated(state: dict[str, Tensor], spectrogram: Tensor, heads: int) -> Tensor:
    """The definition, from the tensors' published names, in the state's dtype."""

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


def by_formula(width: int, steps: int = 64) -> Tensor:
    """MAE's positions one by one: for the frequency and then the time index i, sin and cos of i / 10000^(4k/width)."""
    quarter = width // 4
    rates = 1 / 10_000 ** (numpy.arange(quarter) / quarter)
    rows = [
        numpy.concatenate([numpy.sin(f * rates), numpy.cos(f * rates), numpy.sin(t * rates), numpy.cos(t * rates)])
        for t in range(steps)
        for f in range(8)
    ]
    return torch.tensor(numpy.stack(rows))


def test_network_is_the_definition_in_float64(encoder: SslamEncoder) -> None:
    """Patches, positions, CLS, post-norm blocks."""
    double = SslamEncoder(WIDTH, LAYERS, HEADS).double().eval()
    state = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    state["fixed_positional_encoder.positions"] = by_formula(WIDTH)[None]
    double.load_state_dict(state)
    x = spectrogram(2).double()
    torch.testing.assert_close(double(x), restated(state, x, HEADS), rtol=1e-10, atol=1e-10)


def test_network_in_float32(encoder: SslamEncoder) -> None:
    """Close to the definition, CLS before 512 tokens."""
    x = spectrogram(1, seed=1)
    state = {name: tensor.double() for name, tensor in encoder.state_dict().items()}
    states = encoder(x)
    assert states.shape == (1, 513, WIDTH)
    torch.testing.assert_close(states.double(), restated(state, x.double(), HEADS), rtol=0, atol=1e-4)


def test_token_stands_on_its_patch() -> None:
    """Token 8 * t + f reads frames 16t.. and bins 16f..; seen where no block mixes them."""
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
    """Refused before anything is built."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SslamEncoder(*sizes)


# Published layouts, synthesised


def port(state: State, finetuned: bool = False) -> State:
    """The Hugging Face ports of EAT and SSLAM: positions for 768 steps of time."""
    width = state["extra_tokens"].shape[-1]
    published = {f"model.{name}": tensor for name, tensor in state.items()}
    published["model.fixed_positional_encoder.positions"] = by_formula(width, 768)[None].float()
    if finetuned:
        published |= {"model.fc_norm.weight": torch.ones(width), "model.fc_norm.bias": torch.zeros(width)}
        published |= {"model.head.weight": torch.ones(527, width), "model.head.bias": torch.zeros(527)}
    return published


def fairseq(state: State, finetuned: bool = False) -> State:
    """data2vec-multi's names, with what pretraining leaves: a decoder, projections; or a classifier around it."""
    width = state["extra_tokens"].shape[-1]
    published = {}
    for name, tensor in state.items():
        inner = name.replace("pre_norm.", "context_encoder.norm.")
        published[inner if name.startswith("blocks.") else f"modality_encoders.IMAGE.{inner}"] = tensor
    if finetuned:
        published = {f"model.{name}": tensor for name, tensor in published.items()}
        return published | {"fc_norm.weight": torch.ones(width), "head.weight": torch.ones(527, width)}
    published["modality_encoders.IMAGE.decoder.blocks.0.0.weight"] = torch.ones(width, 3, 3, 3)
    published["modality_encoders.IMAGE.decoder.proj.bias"] = torch.ones(width)
    return published | {"recon_proj.weight": torch.ones(3, width), "cls_proj.bias": torch.ones(width)}


LAYOUTS = {
    "port": port,
    "port, fine-tuned": lambda state: port(state, finetuned=True),
    "fairseq": fairseq,
    "fairseq, fine-tuned": lambda state: fairseq(state, finetuned=True),
    "own": dict,
}


def stored(state: State, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def same(loaded: SslamEncoder, encoder: SslamEncoder) -> bool:
    """All weights equal; positions, which two programs computed, nearly."""
    ours, theirs = encoder.state_dict(), loaded.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in theirs.values())
    positions = "fixed_positional_encoder.positions"
    torch.testing.assert_close(theirs.pop(positions), ours.pop(positions), rtol=0, atol=1e-5)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["directory", "safetensors", "pt"])
def test_published_layouts(tmp_path: Path, encoder: SslamEncoder, layout: str, container: str) -> None:
    """Each gives the encoder that it was made from, from each container."""
    state = LAYOUTS[layout](encoder.state_dict())
    if container == "pt":
        path = tmp_path / "checkpoint_last.pt"
        teacher = {"blocks.0.attn.qkv.weight": torch.ones(2)}
        torch.save({"model": state | {"_ema": teacher}, "cfg": {"task": None}, "optimizer_history": []}, path)
    elif container == "safetensors":
        path = stored(state, tmp_path / "any name.safetensors")
    else:
        path = stored(state, tmp_path / "dir" / "model.safetensors").parent
    loaded = load_sslam(path)
    assert same(loaded, encoder)
    assert loaded.sizes == {"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}


def test_half_precision_and_bare_state_dict(tmp_path: Path, encoder: SslamEncoder) -> None:
    """Loaded as float32, rounded positions and all."""
    path = tmp_path / "half.pth"
    torch.save({name: tensor.half() for name, tensor in port(encoder.state_dict()).items()}, path)
    loaded = load_sslam(path)
    weight = "blocks.1.mlp.fc1.weight"
    assert torch.equal(loaded.state_dict()[weight], encoder.state_dict()[weight].half().float())


def test_heads_are_those_of_the_config(tmp_path: Path, encoder: SslamEncoder) -> None:
    """And 64 wide without one."""
    path = stored(port(encoder.state_dict()), tmp_path / "model.safetensors").parent
    settings = {"model_type": "eat", "num_heads": 4, "norm_eps": 1e-06, "patch_size": 16, "layer_norm_first": False}
    (path / "config.json").write_text(json.dumps(settings))
    assert load_sslam(path).blocks[0].attn.heads == 4


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"got ") as caught:
        load_sslam(path)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {str(path)!r} must ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"checkpoint {str(path)!r} must ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refuses_missing_and_unexpected_tensors(tmp_path: Path, encoder: SslamEncoder, layout: str) -> None:
    """All counted, the first ones named."""
    state = LAYOUTS[layout](encoder.state_dict())
    for name in [name for name in state if "blocks.1.mlp" in name and "decoder" not in name]:
        del state[name]
    message = refusal(stored(state, tmp_path / "a.safetensors"))
    assert message == (
        "hold every tensor of an SSLAM encoder, got 4 missing, "
        "the first 'blocks.1.mlp.fc1.bias', 'blocks.1.mlp.fc1.weight', 'blocks.1.mlp.fc2.bias'"
    )
    state["blocks.0.attn.rel_pos"] = torch.ones(1)
    message = refusal(stored(state, tmp_path / "b.safetensors"))
    assert message.startswith("hold every tensor of an SSLAM encoder and no other, got 4 missing, the first ")
    assert message.endswith(" and 1 unexpected, the first 'blocks.0.attn.rel_pos'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.blocks.0.attn.qkv.weight": torch.ones(3, WIDTH)},
            "hold blocks.0.attn.qkv.weight with shape (384, 128) to fit extra_tokens of width 128, got (3, 128)",
        ),
        (
            {"model.fixed_positional_encoder.positions": by_formula(WIDTH, 32)[None].float()},
            "hold fixed_positional_encoder.positions with shape (1, 512, 128) to fit extra_tokens of width 128, "
            "got (1, 256, 128)",
        ),
        (
            {"model.fixed_positional_encoder.positions": by_formula(WIDTH)[None].float().flip(1)},
            "hold the positions of a grid 8 frequencies wide, got others",
        ),
        (
            {"model.blocks.0.norm1.bias": torch.ones(WIDTH, dtype=torch.int64)},
            "hold blocks.0.norm1.bias as torch.float32, got torch.int64",
        ),
        ({"model.extra_tokens": torch.ones(WIDTH)}, "hold extra_tokens (1, 1, width) and positions of "),
        ({"model.extra_tokens": torch.ones(1, 1, 30)}, "describe an SSLAM encoder, got "),
        ({"blocks.0.norm1.bias": torch.ones(WIDTH)}, "hold safetensors weights, got ValueError: 'blocks.0.norm1.bias'"),
    ],
    ids=["shape", "short positions", "other grid", "integers", "no CLS", "width", "twice"],
)
def test_refuses_tensors_that_do_not_fit(tmp_path: Path, encoder: SslamEncoder, change: State, message: str) -> None:
    """Before anything runs on them."""
    assert refusal(stored(port(encoder.state_dict()) | change, tmp_path / "x.safetensors")).startswith(message)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layer_norm_first": True}, "have layer_norm_first false, got True"),
        ({"norm_eps": 1e-5}, "have norm_eps 1e-06, got 1e-05"),
        ({"stride": 10}, "have stride 16, got 10"),
        ({"num_heads": 3}, "describe an SSLAM encoder, got "),
        ([], "hold a readable config.json, got "),
    ],
)
def test_refuses_a_config_of_another_network(tmp_path: Path, encoder: SslamEncoder, setting: Any, message: str) -> None:
    """One whose weights would load and mean something else."""
    path = stored(port(encoder.state_dict()), tmp_path / "model.safetensors").parent
    (path / "config.json").write_text(json.dumps(setting))
    assert refusal(path).startswith(message)


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harmed"),)


def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: SslamEncoder) -> None:
    """A .pt is read as tensors and plain values."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "harmful.pt"
    torch.save({"model": encoder.state_dict(), "cfg": Harmful()}, path)
    assert refusal(path).startswith("load with torch.load(weights_only=True); if you trust it, store its tensors")
    assert not Path("harmed").exists()


def test_refuses_files_that_hold_no_weights(tmp_path: Path, encoder: SslamEncoder) -> None:
    """In one line each."""
    assert refusal(tmp_path / "none").startswith("be an existing directory or file")
    assert refusal(tmp_path).startswith("hold safetensors weights, got ValueError: neither model.safetensors")
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"PK junk")
    assert refusal(junk).startswith("load with torch.load(weights_only=True)")
    junk = tmp_path / "junk.bin"
    torch.save(encoder.state_dict(), junk)  # a pickle of another name is no safetensors file
    assert refusal(junk).startswith("hold safetensors weights, got SafetensorError")
    other = tmp_path / "list.pt"
    torch.save([torch.ones(1)], other)
    assert refusal(other) == "hold a state dict, got list"
    torch.save(port(encoder.state_dict()) | {"model.pre_norm.bias": 1.0}, other)
    assert refusal(other) == "hold pre_norm.bias once, as a tensor, got float"
    torch.save(port(encoder.state_dict()) | {"pre_norm.bias": torch.ones(WIDTH)}, other)
    assert refusal(other) == "hold pre_norm.bias once, as a tensor, got it twice"
    message = refusal(stored({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.safetensors"))
    assert message.endswith("positions of an SSLAM encoder, got 2 tensors, the first 'a', 'b'")
