"""An audio LLM saved, loaded, and built from parts."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.audio_llm import (
    AUDIO_ID,
    AUDIO_TOKEN,
    INTEGRATIONS,
    batch_of_two,
    build_pal,
    entry,
    logits,
    open_gates,
    processor_of,
    text_config,
    tone,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from palkernels.model import TOWERS, PalForConditionalGeneration


@pytest.mark.parametrize("kind", INTEGRATIONS)
def test_a_saved_model_is_the_same_to_the_bit(kind, tmp_path):
    entries, settings = INTEGRATIONS[kind]
    if kind not in ("plits", "flamingo"):
        settings = settings | {"layers": [0, 2]}
    model = open_gates(build_pal(*entries, freeze_ffn=True, **settings))
    model.generation_config.max_new_tokens = 2
    batch = batch_of_two(model)
    model.save_pretrained(tmp_path)
    processor_of(model).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    for load in (PalForConditionalGeneration, AutoModel, AutoModelForMultimodalLM):
        again = load.from_pretrained(tmp_path)
        assert type(again) is PalForConditionalGeneration
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(logits(again, batch), logits(model, batch))
        assert again.generate(**batch).shape[1] == batch["input_ids"].shape[1] + 2
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trained
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["encoders"] == model.config.encoders
    texts = [f"hear {AUDIO_TOKEN}: what?", f"{AUDIO_TOKEN} then"]
    found = AutoProcessor.from_pretrained(tmp_path)(texts, [tone(), tone(300)], 16_000)
    assert torch.equal(found["input_ids"], batch["input_ids"])
    assert torch.equal(found["audio_lengths"], batch["audio_lengths"])


def test_tied_embeddings_and_dtypes(tmp_path):
    model = build_pal(entry("whisper", "plits"), entry("sslam"), text={"tie_word_embeddings": True})
    batch = batch_of_two(model)
    model.save_pretrained(tmp_path)
    again = PalForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert logits(again, batch).dtype == torch.bfloat16
    torch.testing.assert_close(logits(again, batch).float(), logits(model, batch), rtol=0.1, atol=0.2)
    again.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    same = PalForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert torch.equal(logits(same, batch), logits(again, batch))


def test_pickles_are_not_read(tmp_path):
    model = build_pal(entry("sslam"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("projection", ["shared", "per_layer"])
def test_parts_of_several_dtypes(projection):
    """A float32 connector works before a bfloat16 language model."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), projection=projection)
    batch = batch_of_two(model)
    want = logits(model, batch)
    model.language_model.to(torch.bfloat16)
    torch.testing.assert_close(logits(model, batch).float(), want, rtol=0.1, atol=0.2)


def test_a_checkpoint_without_the_connector_gets_a_new_one(tmp_path):
    """Weights that the checkpoint lacks are drawn, not left as memory happened to be."""
    model = open_gates(build_pal(entry("sslam", "flamingo", "qformer"), flamingo={"every": 2}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if name.startswith(("language", "audio"))}
    save_file(tensors, path, metadata={"format": "pt"})
    again = PalForConditionalGeneration.from_pretrained(tmp_path)
    queries = again.multi_modal_projector[0].queries
    assert 0.005 < float(queries.detach().std()) < 0.08
    assert [(float(x.attention_gate), float(x.ffn_gate)) for x in again.gated_layer.values()] == [(0.0, 0.0)]
    assert logits(again, batch_of_two(model)).isfinite().all()


def test_from_parts(tmp_path):
    """A language model and towers that are there already keep their weights; the rest is as the config says."""
    torch.manual_seed(1)
    language_model = AutoModelForCausalLM.from_config(text_config("gemma2")).eval()
    language_model.generation_config.max_new_tokens = 3
    before = copy.deepcopy(language_model.state_dict())
    tower = TOWERS["sslam"](hidden_size=16, num_layers=1, num_heads=1, seed=7)
    weights = copy.deepcopy(tower.state_dict())
    entries = [{"type": "whisper", "config": entry("whisper")["config"], "connector": {"type": "mlp"}},
               {"type": "sslam", "integration": "plits", "connector": {"type": "mlp"}}]  # fmt: skip
    model = PalForConditionalGeneration.from_parts(
        language_model, entries, [None, tower], audio_token_id=AUDIO_ID, layers=[1, 2]
    )
    assert model.language_model is language_model
    assert language_model.config._attn_implementation == "eager"  # Gemma2's, as it was given
    for found, want in ((language_model.state_dict(), before), (model.audio_tower[1].state_dict(), weights)):
        assert all(torch.equal(found[name], want[name]) for name in want)
    assert model.config.encoders[1]["config"]["hidden_size"] == 16
    drawn = model.multi_modal_projector[1].linear_1.weight  # as nn.Linear draws it, not as the language model's
    assert drawn.abs().max() <= 0.25
    assert drawn.std() > 0.12
    batch = batch_of_two(model)
    assert model.generate(**batch).shape[1] == batch["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path)
    again = PalForConditionalGeneration.from_pretrained(tmp_path, attn_implementation={"text_config": "eager"})
    assert torch.equal(logits(again, batch), logits(model, batch))
    free = PalForConditionalGeneration.from_pretrained(tmp_path, freeze_encoders=False).train()
    assert all(parameter.requires_grad for parameter in free.audio_tower.parameters())
    assert free.audio_tower[1].encoder.training
    assert not again.train().audio_tower[1].encoder.training
    with pytest.raises(TypeError, match="a tower must be a WhisperTower, got SslamTower"):
        PalForConditionalGeneration.from_parts(language_model, entries, [tower, None], audio_token_id=AUDIO_ID)
    with pytest.raises(ValueError, match="towers must be 2, each a module or None, got 1"):
        PalForConditionalGeneration.from_parts(language_model, entries, [tower], audio_token_id=AUDIO_ID)
    with pytest.raises(ValueError, match="towers must have freeze=False as freeze_encoders says"):
        PalForConditionalGeneration.from_parts(
            language_model, entries, [None, tower], audio_token_id=AUDIO_ID, freeze_encoders=False
        )
    with pytest.raises(TypeError, match="settings must be arguments of PalConfig, got 'summary_token'"):
        PalForConditionalGeneration.from_parts(language_model, [entry("whisper")], summary_token=4)


def test_token_ids_are_settings_of_from_parts():
    language_model = AutoModelForCausalLM.from_config(text_config())
    model = PalForConditionalGeneration.from_parts(language_model, [entry("whisper")], pad_token_id=4)
    assert model.config.pad_token_id == model.config.text_config.pad_token_id == 4
