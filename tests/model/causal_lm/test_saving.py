"""Saving what an attached model has beyond the stock one, and what is refused when it comes back."""

import pytest
import torch
from safetensors.torch import save_file
from support.audio_llm import build_pal, entry
from support.oracles import build

from palkernels.model import LalConfig, LfstConnector, MlpConnector, QFormerConnector, attach
from palkernels.model.connectors.audio_grid import AudioGrid


def parts(seed=0):
    torch.manual_seed(seed)
    return MlpConnector(10, 64), {0: torch.nn.Linear(64, 64), 2: torch.nn.Linear(64, 64, bias=False)}


def logits(handle):
    generator = torch.Generator().manual_seed(2)
    ids, encoded = torch.randint(1, 101, (1, 6), generator=generator), torch.randn(1, 5, 10, generator=generator)
    with torch.no_grad():
        return handle.model(ids, audio=handle.state(encoded, insert_at=torch.tensor([2]))).logits


@pytest.mark.parametrize("per_layer", [False, True])
def test_round_trip(tmp_path, per_layer):
    connector, projectors = parts()
    config = LalConfig(layers=(0, 2), rope="none", impl="sdpa", recompute_audio_kv=True)
    handle = attach(build("llama"), config, connector=connector, projectors=projectors if per_layer else None)
    path = handle.save(tmp_path / "deep" / "er")
    assert [file.name for file in path.parent.iterdir()] == ["lal.safetensors"]
    again = attach(build("llama"), tmp_path / "deep" / "er")
    assert again.config == config
    assert torch.equal(logits(again), logits(handle))
    if not per_layer:
        assert again.projectors is None
    handle.save(str(tmp_path / "deep" / "er"))  # over the old one
    assert torch.equal(logits(attach(build("llama"), str(path.parent))), logits(handle))


@pytest.mark.parametrize("kind", ["qformer", "lfst"])
def test_round_trip_of_connectors(tmp_path, kind):
    """Built again from the file alone, and used by handle.state with the encoders' lengths."""
    torch.manual_seed(0)
    grids = (AudioGrid(3, 2, 1.0, 8, 20.0, 4_000.0), AudioGrid(2, 4, 1.0, 8, 50.0, 8_000.0, "slaney"))
    if kind == "qformer":
        connector = QFormerConnector(10, 64, num_queries=4, num_layers=2, width=16, num_heads=2).eval()
        encoded, lengths, tokens = torch.randn(2, 6, 10), torch.tensor([6, 3]), [4, 4]
    else:
        connector = LfstConnector((10, 12), 64, grids, width=16, num_heads=2, depth=1)
        encoded, lengths, tokens = (torch.randn(2, 6, 10), torch.randn(2, 8, 12)), torch.tensor([6, 2]), [9, 3]
    handle = attach(build("llama"), connector=connector)
    handle.save(tmp_path)
    again = attach(build("llama"), tmp_path)
    assert again.connector.config == connector.config
    again.connector.eval()
    state = again.state(encoded, lengths)
    assert state.lengths.tolist() == tokens
    assert torch.equal(state.states, handle.state(encoded, lengths).states)


def test_settings_alone(tmp_path):
    attach(build("qwen3"), LalConfig(rope="none")).save(tmp_path)
    handle = attach(build("qwen3"), tmp_path)
    assert (handle.config, handle.connector, handle.projectors) == (LalConfig(rope="none"), None, None)


def test_another_class_must_be_given(tmp_path):
    connector = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.Tanh())
    handle = attach(build("llama"), connector=connector)
    handle.save(tmp_path)
    with pytest.raises(ValueError, match=r"connector must be given to attach: .* the weights of a Sequential only"):
        attach(build("llama"), tmp_path)
    empty = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.Tanh())
    again = attach(build("llama"), tmp_path, connector=empty)
    assert again.connector is empty
    assert torch.equal(logits(again), logits(handle))
    narrow = torch.nn.Sequential(torch.nn.Linear(9, 64), torch.nn.Tanh())
    before = narrow[0].weight.clone()
    with pytest.raises(ValueError, match="connector must have the tensors saved in"):
        attach(build("llama"), tmp_path, connector=narrow)
    assert torch.equal(narrow[0].weight, before)
    with pytest.raises(ValueError, match=r"modules must be in .*, got projectors.0"):
        attach(build("llama"), tmp_path, connector=empty, projectors={0: torch.nn.Linear(64, 64)})


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_another_model_is_refused(tmp_path, family):
    attach(build("llama")).save(tmp_path)
    model = build(family)
    with pytest.raises(ValueError, match=r"the model must be like the one saved in .*, model_type 'llama'"):
        attach(model, tmp_path)
    assert not hasattr(model, "_palkernels_handle")


def test_what_is_no_such_file(tmp_path):
    with pytest.raises(ValueError, match=r"lal.safetensors must be a file that handle.save wrote, got FileNotFound"):
        attach(build("llama"), tmp_path / "nowhere")
    save_file({"x": torch.zeros(1)}, tmp_path / "lal.safetensors")
    with pytest.raises(ValueError, match=r"must be a file that handle.save wrote, got KeyError"):
        attach(build("llama"), tmp_path)
    (tmp_path / "lal.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"must be a file that handle.save wrote"):
        attach(build("llama"), tmp_path)


def test_nothing_half_written(tmp_path, monkeypatch):
    connector, _ = parts()
    handle = attach(build("llama"), connector=connector)
    path = handle.save(tmp_path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("palkernels.model.causal_lm.saving.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        handle.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["lal.safetensors"]
    assert path.read_bytes() == before


def test_what_is_refused_leaves_the_modules_that_were_given_alone(tmp_path):
    handle = attach(build("llama"), connector=parts()[0])
    handle.save(tmp_path)
    model, (connector, _) = build("llama"), parts(seed=1)
    before = {name: tensor.clone() for name, tensor in connector.state_dict().items()}
    attach(model)
    with pytest.raises(ValueError, match="must be detached before a connector or projectors are attached"):
        attach(model, tmp_path, connector=connector)
    for name, tensor in connector.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_projectors_for_every_layer():
    _, projectors = parts()
    with pytest.raises(ValueError, match=r"projectors must be given for layers \[0, 1, 2\], got \[0, 2\]"):
        attach(build("llama"), projectors=projectors)
    model = build("llama")
    attach(model)
    with pytest.raises(ValueError, match="must be detached before a connector or projectors are attached"):
        attach(model, connector=parts()[0])


def test_a_handle_of_an_audio_llm_says_who_saves_it(tmp_path):
    """It holds no connector, and so would write a file that gives none back."""
    model = build_pal(entry("sslam"))
    handle = attach(model.language_model, model.config.lal())
    with pytest.raises(ValueError, match="save_pretrained of the PalForConditionalGeneration saves the language model"):
        handle.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not any("palkernels_audio" in name for name in model.state_dict())
