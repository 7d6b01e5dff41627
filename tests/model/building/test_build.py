"""An audio LLM built from checkpoints: what was trained stays what it was, what is new comes from a seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.audio_llm import tone
from support.checkpoints import llm_checkpoint, three_checkpoints
from support.towers import equal, whisper_checkpoint

from palkernels.model import AUDIO_TOKEN, PalForConditionalGeneration, PalProcessor, SslamTower, build

SSLAM = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each part: llm, whisper, clap."""
    return three_checkpoints(tmp_path_factory.mktemp("parts"))


def whisper_entry(parts: Path, **changes: Any) -> dict[str, Any]:
    return {"type": "whisper", "checkpoint": parts / "whisper", **changes}


def state(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float64], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trained_weights_stay(parts: Path, tmp_path: Path, dtype: Any, tied: bool) -> None:
    """Bit by bit, in the dtype that was asked for; by default the checkpoint's."""
    llm = llm_checkpoint(tmp_path, tied=tied, dtype=torch.float16)
    whisper = whisper_checkpoint(tmp_path / "whisper")
    model, _ = build(tmp_path, [{"type": "whisper", "checkpoint": tmp_path / "whisper"}], dtype=dtype)
    expected = torch.float16 if dtype is None else torch.bfloat16 if dtype == "bfloat16" else dtype
    assert model.dtype == expected
    assert {tensor.dtype for tensor in model.parameters()} == {expected}
    before = llm.get_input_embeddings().weight.shape[0]
    for name, tensor in llm.state_dict().items():
        now = model.language_model.state_dict()[name]
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(now[:before] if grown else now, tensor.to(expected)), name
    towers = model.audio_tower[0].encoder.state_dict()
    for name, tensor in whisper.model.encoder.state_dict().items():
        assert torch.equal(towers[name], tensor.to(expected)), name
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == tied
    assert not model.training
    assert not any(weight.requires_grad for weight in model.audio_tower.parameters())


@pytest.mark.parametrize("entry", ["lal", "plits", "flamingo"])
def test_saved_and_loaded(parts: Path, tmp_path: Path, entry: str) -> None:
    """Bitwise, the tokenizer and its template too; and it answers the same."""
    settings: dict[str, Any] = (
        {"flamingo": {"every": 2}} if entry == "flamingo" else {"layers": "1-"} if entry == "lal" else {}
    )
    model, processor = build(parts / "llm", [whisper_entry(parts, integration=entry)], **settings)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = PalForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = PalProcessor.from_pretrained(tmp_path)
    assert equal(state(model), state(loaded))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.config.text_config.to_dict() == model.config.text_config.to_dict()
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == processor.tokenizer.chat_template
    messages = [{"role": "user", "content": [{"type": "audio", "audio": tone()}, {"type": "text", "text": "the what"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "sampling_rate": 16_000}
    answers = []
    for one, its in ((model, processor), (loaded, again)):
        inputs = its.apply_chat_template(messages, **options)
        answers.append((inputs["input_ids"], one.generate(**inputs, max_new_tokens=4, do_sample=False)))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_what_is_new_comes_from_the_seed(parts: Path) -> None:
    """And neither draws from the global random state nor moves it."""
    entries = [whisper_entry(parts), {"type": "sslam", "config": SSLAM}]
    torch.manual_seed(5)
    expected = torch.rand(3)
    built = []
    for seed, before in ((1, 5), (1, 9), (2, 5)):
        torch.manual_seed(before)
        model, _ = build(parts / "llm", entries, seed=seed)
        if before == 5:
            assert torch.equal(torch.rand(3), expected)
        built.append(state(model))
    assert equal(built[0], built[1])
    differ = {name for name, tensor in built[0].items() if not torch.equal(tensor, built[2][name])}
    assert {name.split(".")[0] for name in differ} >= {"multi_modal_projector", "audio_tower"}
    assert not any(name.startswith("audio_tower.0.") for name in differ)
    trained = {name for name in differ if name.startswith("language_model.")}
    assert trained == {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}


def test_every_encoder_and_connector(parts: Path) -> None:
    """Settings beside a connector's type reach it; encoders that LFST fuses come as lists."""
    entries = [
        {"type": "clap", "checkpoint": parts / "clap", "connector": {"type": "qformer", "num_queries": 3}},
        {"type": ["sslam", "clap"], "config": [SSLAM, None], "checkpoint": [None, parts / "clap"],
         "connector": {"type": "lfst", "width": 16, "num_heads": 2, "depth": 1}},
        whisper_entry(parts, integration="plits", connector={"type": "mlp", "stack": 2}),
    ]  # fmt: skip
    model, processor = build(parts / "llm", entries)
    connectors = [(entry["connector"]["type"], entry["integration"]) for entry in model.config.encoders]
    assert connectors == [("qformer", "lal"), ("lfst", "lal"), ("mlp", "plits")]
    assert model.multi_modal_projector[0].num_queries == 3
    assert isinstance(model.audio_tower[1], SslamTower)
    assert equal(model.audio_tower[0].state_dict(), model.audio_tower[2].state_dict())
    inputs = processor(f"{AUDIO_TOKEN} what?", tone(), 16_000)
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 3  # 0.1 s: five states, two and two joined
    assert torch.isfinite(model(**inputs).logits).all()


def test_encoders_that_learn(parts: Path) -> None:
    model, _ = build(parts / "llm", [whisper_entry(parts)], freeze_encoders=False, freeze_ffn=True)
    assert model.audio_tower[0].encoder.layers[0].fc1.weight.requires_grad
    assert not model.language_model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_layers_in_words(parts: Path) -> None:
    for text, layers in (
        ("all", "all"),
        ("1-", [1, 2]),
        ("0-1", [0, 1]),
        ("2", [2]),
        ("2, 0-1", [0, 1, 2]),
        ([1], [1]),
    ):
        model, _ = build(parts / "llm", [whisper_entry(parts)], layers=text)
        assert model.config.layers == layers
    for text in ("3", "1-3", "2-1", "x", "", "-1", "1--2"):
        with pytest.raises(ValueError, match=r"^layers must be "):
            build(parts / "llm", [whisper_entry(parts)], layers=text)
