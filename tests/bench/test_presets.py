"""The presets have the published sizes, and a local directory brings its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config

from palkernels.bench.errors import UserError
from palkernels.bench.presets import PRESETS, LlmPlan, plan_llm
from palkernels.model.causal_lm.layers import head_dim_of

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(plan: LlmPlan, seed: int = 0) -> Any:
    return plan.build(torch.float32, CPU, seed)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # The counts that the models' own pages state.
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan_llm(name, None).config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_rope_of_the_presets() -> None:
    llama = PRESETS["llama-3.2-1b"]().rope_parameters
    assert (llama["rope_type"], llama["rope_theta"], llama["factor"]) == ("llama3", 500000.0, 32.0)
    assert PRESETS["qwen2.5-1.5b"]().rope_parameters["rope_theta"] == 1000000.0
    assert PRESETS["smollm2-135m"]().rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}


def test_the_width_of_a_head() -> None:
    assert [head_dim_of(PRESETS[name]()) for name in ("llama-3.2-3b", "qwen2.5-1.5b", "smollm2-135m")] == [128, 128, 64]


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_directory_without_weights_gets_random_ones(config: Any, tmp_path: Path) -> None:
    config(**TINY, tie_word_embeddings=True).save_pretrained(tmp_path)
    plan = plan_llm(str(tmp_path), layers=2)
    assert (plan.layers, plan.full_layers) == (2, 3)
    first, again, other = build(plan), build(plan), build(plan, seed=1)
    assert first.weights == "random (seed 0)"
    assert not first.model.training
    assert first.model.lm_head.weight is first.model.get_input_embeddings().weight
    for name, tensor in first.model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, again.model.state_dict()[name])
    embedding = first.model.get_input_embeddings().weight
    assert not torch.equal(embedding, other.model.get_input_embeddings().weight)
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)
    ids = torch.arange(8)[None]
    expected = config(**{**TINY, "num_hidden_layers": 2}, tie_word_embeddings=True)
    stock = AutoModelForCausalLM.from_config(expected, attn_implementation="sdpa").eval()
    stock.load_state_dict(first.model.state_dict())
    # Building without transformers' initialisation leaves nothing undone, RoPE's frequencies for one.
    assert torch.equal(first.model(ids).logits, stock(ids).logits)


def test_directory_with_weights_is_read(tmp_path: Path) -> None:
    saved = LlamaForCausalLM(LlamaConfig(**TINY))
    saved.save_pretrained(tmp_path)
    llm = build(plan_llm(str(tmp_path), None))
    assert llm.weights == str(tmp_path)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, llm.model.state_dict()[name])
    shorter = build(plan_llm(str(tmp_path), 1)).model
    assert len(shorter.model.layers) == 1
    assert torch.equal(shorter.model.layers[0].mlp.up_proj.weight, saved.model.layers[0].mlp.up_proj.weight)


def test_incomplete_and_damaged_weights(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 1})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"must hold every weight, got none for 'model\.layers\.1"):
        build(plan_llm(str(tmp_path), None))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="must hold readable weights"):
        build(plan_llm(str(tmp_path), None))


def test_what_is_no_model(tmp_path: Path) -> None:
    known = r"llama-3\.2-1b, llama-3\.2-3b, qwen2\.5-1\.5b, smollm2-135m"
    with pytest.raises(UserError, match=rf"one of {known} or a directory"):
        plan_llm("llama-4", None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"must hold a valid config\.json"):
        plan_llm(str(tmp_path), None)
    BertConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert plan_llm(str(tmp_path), None).layers == 2  # refused later, by the method that cannot take it
    for layers in (0, 17):
        with pytest.raises(UserError, match="--layers must be from 1 to 16"):
            plan_llm("llama-3.2-1b", layers)


def test_building_two_layers_at_full_width_is_quick_work() -> None:
    """Only that the big preset's cut is what it should be; building it takes gigabytes, so it stays on meta."""
    config = plan_llm("qwen2.5-1.5b", 2).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert len(model.model.layers) == 2
    assert model.get_input_embeddings().weight.shape == (151936, 1536)
