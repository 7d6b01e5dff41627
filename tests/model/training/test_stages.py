"""What each `train:` value trains, and that it is all: what trains moves, everything else stays to the bit. And the
small file of what a stage trained, loaded into the model that it began with."""

import copy

import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, INTEGRATIONS, batch_of, build_pal, entry, labelled, open_gates, tone
from torch import nn

from palkernels.model.training.recipe import LoraRecipe, StageRecipe
from palkernels.model.training.stages import choose, parameter_groups, part_of, trained_tensors
from palkernels.model.training.trained import gather, load_trained, put_back, save_trained

LORA = LoraRecipe(r=2, alpha=4.0)


def stage_of(*train, **settings):
    return StageRecipe("one", train, (), dict.fromkeys(train, 1e-2), lora=LORA, **settings)


def model_of(name, **settings):
    entries, own = INTEGRATIONS[name]
    return open_gates(build_pal(*entries, **own, **settings))


def step(model, stage):
    """One step of training; returns the names by part."""
    torch.manual_seed(0)
    chosen = choose(model, stage.train, stage.lora)
    optimizer = torch.optim.AdamW(parameter_groups(model, chosen, stage))
    batch = labelled(batch_of(model, [f"{AUDIO_TOKEN}is a", f"b {AUDIO_TOKEN} hum"], [tone(), tone(300)]))
    for _ in range(2):  # an adapter's A has no gradient while its B is zero
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    return chosen


def in_ffn(name):
    return ".mlp." in name


# By what trains: the model, and which of its parameters move.
CASES = {
    "connector": ("plits+lal", lambda name: part_of(name) == "connector"),
    "projectors": ("summary", lambda name: part_of(name) == "projectors"),
    "flamingo": ("flamingo", lambda name: part_of(name) == "flamingo"),
    "llm": ("lal", lambda name: part_of(name) == "llm"),
    "attention": ("lal", lambda name: part_of(name) == "llm" and not in_ffn(name)),
    "encoders": ("lal", lambda name: part_of(name) == "encoders"),
    "all": ("summary", lambda name: part_of(name) != "encoders"),
}


@pytest.mark.parametrize("train", CASES)
def test_what_trains_moves_and_nothing_else(train, tmp_path):
    name, moves = CASES[train]
    settings = {"freeze_encoders": False} if train == "encoders" else {}
    model = model_of(name, **settings)
    before = copy.deepcopy(model.state_dict())
    stage = stage_of(train)
    chosen = step(model, stage)
    want = {name for name, _ in model.named_parameters() if moves(name)}
    assert set(chosen[train]) == want
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    unmoved = want - moved
    assert moved == want - unmoved
    # A loss is the same for every shift of all keys, and an embedding that is in no text has no gradient.
    assert all("k_proj.bias" in name or "pos" in name or "temporal" in name for name in unmoved), unmoved

    save_trained(gather(model), tmp_path / "trained.safetensors", stage, torch.float32)
    again = model_of(name, **settings)
    assert load_trained(again, tmp_path / "trained.safetensors") == {"train": [train], "stage": "one"}
    for name, x in again.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name


def test_adapters(tmp_path):
    """They move, with the connector; merged when they are loaded, they give the same model."""
    model = model_of("lal")
    before = copy.deepcopy(model.state_dict())
    stage = stage_of("connector", "lora")
    chosen = step(model, stage)
    assert len(chosen["lora"]) == 3 * 4 * 2
    assert all(".lora_" in name for name in chosen["lora"])
    for name, x in model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(x, before[name.replace(".base_layer", "")]) == (part_of(name) != "connector"), name
    save_trained(gather(model), tmp_path / "trained.safetensors", stage, torch.float32)
    again = model_of("lal")
    about = load_trained(again, tmp_path / "trained.safetensors")
    assert about == {"train": ["connector", "lora"], "stage": "one", "lora": {"r": 2, "alpha": 4.0}}
    batch = batch_of(model, [f"{AUDIO_TOKEN}is a"], [tone()])
    with torch.no_grad():
        want, got = model.eval()(**batch).logits, again.eval()(**batch).logits
    torch.testing.assert_close(got, want)
    assert (tmp_path / "trained.safetensors").stat().st_size < 60_000  # not the language model


def test_groups_have_their_rates():
    model = model_of("summary")
    stage = StageRecipe("one", ("connector", "llm"), (), {"connector": 1e-3, "llm": 1e-5}, weight_decay=0.1)
    groups = parameter_groups(model, choose(model, stage.train, LORA), stage)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-3, 0.1), (1e-3, 0.0), (1e-5, 0.1), (1e-5, 0.0),
    ]  # fmt: skip
    trained = {id(x) for _, x in trained_tensors(model)}
    assert {id(x) for group in groups for x in group["params"]} == trained
    assert all((x.ndim > 1) == (group["weight_decay"] > 0) for group in groups for x in group["params"])


def test_trained_parts_of_16_bits_are_float32():
    model = build_pal(entry("sslam"), dtype=torch.bfloat16)
    choose(model, ("connector",), LORA)
    assert {x.dtype for x in model.multi_modal_projector.parameters()} == {torch.float32}
    assert {x.dtype for x in model.language_model.parameters()} == {torch.bfloat16}


def test_refused(tmp_path):
    model = model_of("lal")
    with pytest.raises(ValueError, match="train must name parts that the model has, got 'projectors'"):
        choose(model, ("projectors",), LORA)
    with pytest.raises(
        ValueError, match=r"lora\.targets must name modules of the language model, down_proj, .*, got 'query'"
    ):
        choose(model, ("lora",), LoraRecipe(targets=("query",)))
    choose(model, ("connector",), LORA)
    held = gather(model)
    with pytest.raises(ValueError, match=r"must hold what is trained of the model, got no 'multi_modal_projector\.0"):
        put_back(model, {})
    save_trained(held, tmp_path / "trained.safetensors", stage_of("connector"), torch.float32)
    before = copy.deepcopy(model.state_dict())
    model.multi_modal_projector[0].linear_2 = nn.Linear(64, 3)
    with pytest.raises(ValueError, match="linear_2"):
        load_trained(model, tmp_path / "trained.safetensors")
    first = "multi_modal_projector.0.linear_1.weight"
    assert torch.equal(model.state_dict()[first], before[first])
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(ValueError, match="path must be what a stage trained, got"):
        load_trained(model, tmp_path / "other")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("w_proj", r"must name modules of the language model, down_proj, gate_proj, .*, got 'w_proj'"),
        ("embed_tokens", "must name linear layers with weights of their own, got 'embed_tokens', a Embedding"),
        ("lm_head", "got 'lm_head', tied to the embedding"),
    ],
)
def test_adapters_that_would_be_lost_are_refused(target, message):
    """What matches nothing, and what no file could keep: before anything has changed."""
    model = model_of("lal")
    model.language_model.config.tie_word_embeddings = True
    model.language_model.lm_head.weight = model.language_model.get_input_embeddings().weight
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        choose(model, ("lora",), LoraRecipe(r=2, targets=("q_proj", target)))
    assert [name for name, _ in model.named_parameters()] == names


def test_encoders_keep_what_they_never_train():
    model = build_pal(entry("whisper"), freeze_encoders=False)
    names = choose(model, ("encoders",), LORA)["encoders"]
    own = [name for name, _ in model.named_parameters() if part_of(name) == "encoders"]
    assert names == [name for name in own if "embed_positions" not in name]
    assert len(names) == len(own) - 1
    assert not model.audio_tower[0].encoder.embed_positions.weight.requires_grad
