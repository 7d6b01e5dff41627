"""SSLAM's published weights: every layout gives the encoder that it was made from, and nothing else is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.sslam import HEADS, LAYERS, WIDTH, by_formula

from palkernels.model.encoders.sslam import SslamEncoder, load_sslam

State = dict[str, Any]


def port(state: State, finetuned: bool = False) -> State:
    """The layout of the Hugging Face ports of EAT and SSLAM, with positions for 768 steps of time."""
    width = state["extra_tokens"].shape[-1]
    published = {f"model.{name}": tensor for name, tensor in state.items()}
    published["model.fixed_positional_encoder.positions"] = by_formula(width, 768)[None].float()
    if finetuned:
        published |= {"model.fc_norm.weight": torch.ones(width), "model.fc_norm.bias": torch.zeros(width)}
        published |= {"model.head.weight": torch.ones(527, width), "model.head.bias": torch.zeros(527)}
    return published


def fairseq(state: State, finetuned: bool = False) -> State:
    """fairseq's layout: its names, and a decoder and projections from pretraining, or a classifier around it."""
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
    """Whether all weights are equal; positions, which two programs computed, need only be close."""
    ours, theirs = encoder.state_dict(), loaded.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in theirs.values())
    positions = "fixed_positional_encoder.positions"
    torch.testing.assert_close(theirs.pop(positions), ours.pop(positions), rtol=0, atol=1e-5)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["directory", "safetensors", "pt"])
def test_published_layouts(tmp_path: Path, encoder: SslamEncoder, layout: str, container: str) -> None:
    """Each layout, in each container, gives the encoder that it was made from."""
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
    """float16 weights load as float32, although their positions are rounded."""
    path = tmp_path / "half.pth"
    torch.save({name: tensor.half() for name, tensor in port(encoder.state_dict()).items()}, path)
    loaded = load_sslam(path)
    weight = "blocks.1.mlp.fc1.weight"
    assert torch.equal(loaded.state_dict()[weight], encoder.state_dict()[weight].half().float())


def test_heads_are_those_of_the_config(tmp_path: Path, encoder: SslamEncoder) -> None:
    """Without a config heads are 64 wide, as `test_published_layouts` shows."""
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
    """The error counts all of them and names the first ones."""
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
    """Tensors that do not fit are refused before anything runs on them."""
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
    """A config is refused if the weights would load and mean something else."""
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
    """Each is refused in one line."""
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
