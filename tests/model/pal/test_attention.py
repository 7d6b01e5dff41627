"""``attn_implementation``: it reaches every part of an audio LLM, or is refused by the part's name."""

import copy
import json

import pytest
import torch
from support.audio_llm import batch_of_two, build_pal, entry, logits, text_config
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from palkernels.model import TOWERS, PalConfig, PalForConditionalGeneration

ENTRIES = [entry("whisper", "plits"), entry("sslam", "lal", "qformer")]


def names(model):
    """How the model, its language model, its towers and connectors attend."""
    parts = [*model.audio_tower, *model.multi_modal_projector]
    config = model.config
    assert model.language_model.config is config.text_config
    return [
        config._attn_implementation,
        config.text_config._attn_implementation,
        *(x.attn_implementation for x in parts),
    ]


def everywhere(name):
    return [name] * 4 + [None, name]  # the MLP attends to nothing


def by_config(model, path, chosen):
    return PalForConditionalGeneration(PalConfig.from_dict(model.config.to_dict() | {"attn_implementation": chosen}))


def by_from_config(model, path, chosen):
    return AutoModelForMultimodalLM.from_config(copy.deepcopy(model.config), attn_implementation=chosen)


def by_from_pretrained(model, path, chosen):
    model.save_pretrained(path)
    return PalForConditionalGeneration.from_pretrained(path, attn_implementation=chosen)


def by_setting(model, path, chosen):
    again = copy.deepcopy(model)
    again.set_attn_implementation(chosen)
    return again


WAYS = pytest.mark.parametrize("way", [by_config, by_from_config, by_from_pretrained, by_setting])


@pytest.fixture
def calls(monkeypatch):
    """Calls of PyTorch's fused attention."""
    made, attend = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        made.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return made


@WAYS
def test_a_name_reaches_every_part(way, tmp_path, calls):
    """In "eager" no encoder and no Q-Former calls the fused attention; in both, audio is encoded alike."""
    model = build_pal(*ENTRIES)
    batch = batch_of_two(model)
    features = []
    for chosen in ("eager", "sdpa"):
        found = way(model, tmp_path, chosen).eval()
        assert names(found) == everywhere(chosen)
        found.load_state_dict(model.state_dict())
        calls.clear()
        with torch.no_grad():
            features.append(found.get_audio_features(batch["input_features"], batch["audio_lengths"]))
        assert len(calls) == (0 if chosen == "eager" else 4)  # a layer each, of the Q-Former twice
    for eager, fused in ((features[0].plits, features[1].plits), (features[0].lal, features[1].lal)):
        torch.testing.assert_close(eager.states, fused.states, rtol=1e-4, atol=1e-5)


@WAYS
def test_a_dict_reaches_the_parts_that_it_names(way, tmp_path):
    model = build_pal(*ENTRIES)
    assert names(model) == everywhere("sdpa")
    sdpa = everywhere("sdpa")
    assert names(way(model, tmp_path, {"text_config": "eager"})) == ["sdpa", "eager", *sdpa[2:]]
    assert names(way(model, tmp_path, {"encoders": "eager"})) == ["sdpa", "sdpa", *everywhere("eager")[2:]]
    assert names(way(model, tmp_path, {"": "eager"})) == ["eager", *sdpa[1:]]
    assert names(way(model, tmp_path, {"text_config": "eager", "encoders": "sdpa"})) == ["sdpa", "eager", *sdpa[2:]]


@WAYS
@pytest.mark.parametrize(
    ("entries", "chosen", "message"),
    [
        (ENTRIES, "flex_attention", 'one that SslamTower has, got \'flex_attention\': SSLAM has "sdpa" and "eager"; '),
        ([entry("clap")], "sdpa", "one that ClapTower has, got 'sdpa': CLAP has \"eager\" alone; "),
        (ENTRIES, {"encoders": "magic"}, "one that WhisperTower has, got 'magic': "),
        (ENTRIES, {"audio_tower": "eager"}, 'the keys "", "text_config" and "encoders", got'),
        (ENTRIES, {"encoders": ["eager"]}, "a name for \"encoders\", got \\['eager'\\]"),
    ],
)
def test_what_a_part_has_not_is_refused(way, entries, chosen, message, tmp_path):
    model = build_pal(*entries)
    before = names(model)
    with pytest.raises(ValueError, match=f"^attn_implementation must (be|have) {message}") as caught:
        way(model, tmp_path, chosen)
    assert len(str(caught.value).splitlines()) == 1
    assert names(model) == before


def test_a_refused_choice_changes_nothing():
    """Whisper, which comes before SSLAM, and the language model attend as before."""
    model = build_pal(*ENTRIES)
    model.set_attn_implementation({"text_config": "eager"})
    before = names(model)
    with pytest.raises(ValueError, match="one that SslamTower has"):
        model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="magic"):
        model.set_attn_implementation({"encoders": "eager", "text_config": "magic"})
    assert names(model) == before
    assert model.config.encoders_attn_implementation is None


def test_what_nobody_asked_for_is_left_to_each_part():
    """The language model's own way is not the encoders': CLAP stays eager, Whisper and SSLAM fused."""
    text = text_config("gemma2")
    assert text._attn_implementation == "eager"
    config = PalConfig(text_config=text, encoders=[entry("clap"), entry("whisper"), entry("sslam")])
    model = PalForConditionalGeneration(config)
    assert names(model) == ["eager", "eager", "eager", "sdpa", "sdpa", None, None, None]


def test_from_parts():
    """Given towers attend as asked too."""
    language_model = AutoModelForCausalLM.from_config(text_config())
    towers = [TOWERS["whisper"](**entry("whisper")["config"]), None]
    model = PalForConditionalGeneration.from_parts(
        language_model, ENTRIES, towers, audio_token_id=2, attn_implementation="eager"
    )
    assert names(model) == everywhere("eager")
    assert model.audio_tower[0] is towers[0]
    language_model = AutoModelForCausalLM.from_config(text_config("gemma2"))
    with pytest.raises(ValueError, match="one that ClapTower has, got 'sdpa'"):
        PalForConditionalGeneration.from_parts(language_model, [entry("clap")], attn_implementation="sdpa")
    assert language_model.config._attn_implementation == "eager"
    assert not hasattr(language_model, "_palkernels_handle")
    language_model = AutoModelForCausalLM.from_config(text_config())
    eager = {"text_config": "eager"}
    model = PalForConditionalGeneration.from_parts(language_model, [entry("whisper")], attn_implementation=eager)
    assert names(model) == ["sdpa", "eager", "sdpa", None]


def test_a_choice_is_not_saved(tmp_path):
    model = build_pal(*ENTRIES)
    plain = model.config.to_dict()
    model.set_attn_implementation("eager")
    assert model.config.to_dict() == plain
    assert copy.deepcopy(model.config).encoders_attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["encoders"] == plain["encoders"]
    again = PalForConditionalGeneration.from_pretrained(tmp_path)
    assert names(again) == everywhere("sdpa")
    batch = batch_of_two(model)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
