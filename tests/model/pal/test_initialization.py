"""Weights that no checkpoint brings: whatever way a model is made, they are drawn as the constructors draw them."""

import copy
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.audio_llm import INTEGRATIONS, batch_of_two, build_pal, entry, logits, open_gates, text_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from palkernels.model import TOWERS, PalForConditionalGeneration
from palkernels.model.connectors.audio_grid import AudioGrid

MODELS = INTEGRATIONS | {
    "qformer": ([entry("clap", "plits", "qformer"), entry("whisper")], {"projection": "per_layer"}),
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def config_of(kind):
    entries, settings = MODELS[kind]
    return build_pal(*entries, **settings).config


def tensors_of(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


def on_meta(config):
    with torch.device("meta"):
        model = PalForConditionalGeneration(config)
    model.to_empty(device="cpu")
    for tensor in tensors_of(model).values():
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    return model


def without_weights(config):
    return PalForConditionalGeneration.from_pretrained(None, config=config, state_dict={})


@pytest.fixture
def seeded(monkeypatch):
    """Every module draws from the same seed, so that what is drawn in the same way is equal."""
    initialize = PreTrainedModel._initialize_weights

    def seeded_initialize(self, module, *args):
        torch.manual_seed(0)
        return initialize(self, module, *args)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded_initialize)


@EVERY_MODEL
@pytest.mark.parametrize("make", [on_meta, without_weights])
def test_everything_is_drawn_as_in_the_constructor(kind, make, seeded):
    config = config_of(kind)
    expected = tensors_of(PalForConditionalGeneration(copy.deepcopy(config)))
    found = tensors_of(make(copy.deepcopy(config)))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def drawn_connectors(make):
    """Weights by name of a model with each connector, projections of each layer or gated layers, wide enough to see
    how they were drawn."""
    grids = [asdict(AudioGrid(time, 2, 1.0, 8, 0.0, 4e3)) for time in (4, 9)]
    connectors = {
        "mlp": {},
        "qformer": {"num_queries": 32, "num_layers": 1, "width": 64, "num_heads": 1},
        "lfst": {"width": 64, "num_heads": 1, "depth": 1, "grids": grids},
    }
    tensors = {}
    for name, settings in connectors.items():
        tower = ["sslam", "clap"] if name == "lfst" else "sslam"
        described = entry(tower, "flamingo" if name == "qformer" else "lal", name) | {"connector": {"type": name,
                                                                                      "config": settings}}  # fmt: skip
        more = {"flamingo": {"every": 2}} if name == "qformer" else {"projection": "per_layer"}
        model = make(build_pal(described, **more).config)
        for prefix in ("multi_modal_projector", "layer_projector", "gated_layer"):
            part = getattr(model, prefix)
            tensors |= {f"{name}.{prefix}.{key}": tensor.detach() for key, tensor in part.state_dict().items()}
    return tensors


def expected_distribution(name, tensors):
    """The bound of a uniform distribution or the standard deviation of a normal one, as PyTorch, BLIP-2 and Cambrian-1
    draw: (kind, size); for constants the value."""
    tensor, last = tensors[name], name.rpartition(".")[2]
    if last.endswith("gate"):
        return "constant", 0.0
    if ".qformer." in name:  # BLIP-2's own
        if "LayerNorm" in name or "layernorm" in name:
            return "constant", float(last == "weight")
        return ("constant", 0.0) if last == "bias" else ("normal", 0.02)
    if last in ("queries", "query", "newline"):
        return "normal", 0.02 if last == "queries" else tensor.numel() ** -0.5
    if ".places." in name:
        return "normal", 1.0
    weight = tensors[f"{name.rpartition('.')[0]}.weight"]
    if weight.ndim == 1:  # a norm's
        return "constant", float(last == "weight")
    return "uniform", weight.shape[1] ** -0.5


@pytest.mark.parametrize("make", [PalForConditionalGeneration, on_meta, without_weights])
def test_connectors_and_layers_have_the_stated_distributions(make):
    torch.manual_seed(3)
    tensors = drawn_connectors(make)
    seen = set()
    for name, tensor in tensors.items():
        kind, size = expected_distribution(name, tensors)
        seen.add(kind)
        assert tensor.isfinite().all(), name
        if kind == "constant":
            assert bool((tensor == size).all()), name
            continue
        enough = tensor.numel() >= 64
        assert not enough or abs(float(tensor.mean())) < 0.5 * size, name
        std = size / 3**0.5 if kind == "uniform" else size
        assert not enough or float(tensor.std()) == pytest.approx(std, rel=0.3), name
        if kind == "uniform":
            assert float(tensor.abs().max()) <= size, name
        elif tensor.numel() >= 1000:
            assert float(tensor.abs().max()) > 2.5 * size, name
    assert seen == {"constant", "normal", "uniform"}


@EVERY_MODEL
def test_a_language_models_checkpoint_alone(kind, tmp_path):
    """Towers get the weights of their seed, and all else is finite; the language model's are kept."""
    entries, settings = MODELS[kind]
    model = open_gates(build_pal(*entries, **settings))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: x for name, x in load_file(path).items() if name.startswith("language_model")}
    save_file(kept, path, metadata={"format": "pt"})
    again = PalForConditionalGeneration.from_pretrained(tmp_path)
    found = again.state_dict()
    assert all(torch.equal(found[name], x) for name, x in kept.items())
    assert all(x.isfinite().all() for x in tensors_of(again).values())
    for name, x in model.audio_tower.state_dict().items():
        assert torch.equal(again.audio_tower.state_dict()[name], x), name
    assert all(float(x.detach()) == 0 for name, x in again.named_parameters() if name.endswith("_gate"))
    assert logits(again, batch_of_two(again)).isfinite().all()


def test_single_tensors_that_are_missing(tmp_path):
    """Each is drawn, and those beside it in the same module are kept."""
    model = build_pal(entry("sslam"), entry("clap", "lal", "qformer"), projection="per_layer")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    missing = (
        "audio_tower.0.encoder.extra_tokens",
        "audio_tower.0.encoder.fixed_positional_encoder.positions",
        "audio_tower.1.encoder.audio_encoder.batch_norm.running_var",
        "multi_modal_projector.0.linear_1.bias",
        "multi_modal_projector.1.queries",
        "layer_projector.1.weight",
    )
    stored = load_file(path)
    assert set(missing) <= stored.keys()
    save_file({name: x for name, x in stored.items() if name not in missing}, path, metadata={"format": "pt"})
    found = PalForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in stored.items():
        if name not in missing:
            assert torch.equal(found[name], tensor), name
    fresh = {
        i: TOWERS[kind](**model.config.encoders[i]["config"]).state_dict() for i, kind in enumerate(["sslam", "clap"])
    }
    for name in missing[:3]:
        _, i, key = name.split(".", 2)
        assert torch.equal(found[name], fresh[int(i)][key]), name
    assert 0 < float(found[missing[3]].abs().max()) <= 16**-0.5
    assert float(found[missing[4]].std()) == pytest.approx(0.02, rel=0.5)
    assert 0 < float(found[missing[5]].abs().max()) <= 64**-0.5


def test_adapters_of_a_language_model_are_kept():
    """Adapters are no weights of transformers' and would be drawn anew with the connectors."""
    from peft import LoraConfig, get_peft_model

    language_model = AutoModelForCausalLM.from_config(text_config())
    adapted = get_peft_model(language_model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapters = {name: x for name, x in adapted.named_parameters() if "lora" in name}
    for x in adapters.values():
        torch.nn.init.constant_(x, 0.5)
    model = PalForConditionalGeneration.from_parts(adapted, [entry("sslam")])
    found = dict(model.language_model.named_parameters())
    assert len(adapters) == 6
    assert all(bool((found[name] == 0.5).all()) for name in adapters)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_towers_weights_are_kept_however_they_came(kind):
    """A tower that was built without memory and then filled is no tower without weights."""
    weights = TOWERS[kind](**entry(kind)["config"], seed=5).state_dict()
    with torch.device("meta"):
        tower = TOWERS[kind](**entry(kind)["config"])
    tower.load_state_dict(weights, assign=True)
    for name, buffer in TOWERS[kind](**entry(kind)["config"]).named_buffers():
        if name not in weights:
            tower.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    model = PalForConditionalGeneration.from_parts(
        AutoModelForCausalLM.from_config(text_config()), [entry(kind)], [tower], audio_token_id=2
    )
    found = model.audio_tower[0].state_dict()
    assert all(torch.equal(found[name], x) for name, x in weights.items())
