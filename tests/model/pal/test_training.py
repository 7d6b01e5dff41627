"""An audio LLM trained by other people's loops, saved, loaded, and built from parts."""

import copy
import json

import pytest
import torch
from support.audio_llm import (
    AUDIO_ID,
    AUDIO_TOKEN,
    TOKENIZER,
    build_pal,
    entry,
    open_gates,
    processor_of,
    text_config,
    tone,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from palkernels.model import TOWERS, LalConfig, PalConfig, PalForConditionalGeneration, attach

KINDS = {
    "lal": ([entry("sslam")], {}),
    "plits": ([entry("sslam", "plits")], {}),
    "plits+lal": ([entry("whisper", "plits"), entry("sslam")], {}),
    "flamingo": ([entry("sslam", "flamingo")], {"flamingo": {"every": 1, "ffn_multiplier": 1}}),
    "lfst": ([entry(["sslam", "clap"], "lal", "lfst")], {}),
    "summary": ([entry("sslam")], {"summary_tokens": 2, "projection": "per_layer"}),
}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def batch_of(model, texts=(f"hear {AUDIO_TOKEN}: what?", f"{AUDIO_TOKEN} then"), audio=None, **settings):
    return dict(processor_of(model)(list(texts), audio or [tone(), tone(300)], 16_000, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_the_same_to_the_bit(kind, tmp_path):
    entries, settings = KINDS[kind]
    model = open_gates(build_pal(*entries, layers=[0, 2], freeze_ffn=True, **settings))
    model.generation_config.max_new_tokens = 2
    batch = batch_of(model)
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
    batch = batch_of(model)
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
    """A connector in float32 before a language model in half of it."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), projection=projection)
    batch = batch_of(model)
    want = logits(model, batch)
    model.language_model.to(torch.bfloat16)
    torch.testing.assert_close(logits(model, batch).float(), want, rtol=0.1, atol=0.2)


def test_a_checkpoint_without_the_connector_gets_a_new_one(tmp_path):
    """Nothing is left as memory happened to be."""
    from safetensors.torch import load_file, save_file

    model = open_gates(build_pal(entry("sslam", "flamingo", "qformer"), flamingo={"every": 2}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if name.startswith(("language", "audio"))}
    save_file(tensors, path, metadata={"format": "pt"})
    again = PalForConditionalGeneration.from_pretrained(tmp_path)
    queries = again.multi_modal_projector[0].queries
    assert 0.005 < float(queries.detach().std()) < 0.08
    assert [(float(x.attention_gate), float(x.ffn_gate)) for x in again.gated_layer.values()] == [(0.0, 0.0)]
    assert logits(again, batch_of(model)).isfinite().all()


def test_from_parts(tmp_path):
    """A language model and towers that are there already keep their weights; the rest is as config says."""
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
    batch = batch_of(model)
    assert model.generate(**batch).shape[1] == batch["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path)
    again = PalForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
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


def test_what_is_trained():
    def gradients(**settings):
        model = build_pal(entry("whisper", "plits"), entry("sslam"), **settings).train()
        batch = batch_of(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, encoders, ffn = gradients(), gradients(freeze_encoders=False), gradients(freeze_ffn=True)
    assert not any(name.startswith("audio_tower") for name in plain)
    assert {name.split(".")[1] for name in plain if name.startswith("multi_modal")} == {"0", "1"}
    assert {name.split(".")[1] for name in encoders - plain} == {"0", "1"}
    assert {name.split(".")[-3] for name in plain - ffn} == {"mlp"}


def test_lora_on_the_language_model(tmp_path):
    """Adapters in place, or around the language model: the same, and they act on audio."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    entries = [entry("whisper", "plits"), entry("sslam")]
    wrapped, inside = build_pal(*entries), build_pal(*entries)
    batch = batch_of(wrapped)
    plain = logits(wrapped, batch)
    torch.manual_seed(3)
    wrapped.language_model = get_peft_model(wrapped.language_model, lora)
    torch.manual_seed(3)
    get_peft_model(inside.language_model, lora)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    got = logits(wrapped, batch)
    assert not torch.allclose(got, plain)
    assert torch.equal(got, logits(inside, batch))
    assert torch.equal(wrapped.generate(**batch, **settings), inside.generate(**batch, **settings))
    wrapped.train()(**batch, labels=batch["input_ids"]).loss.backward()
    grads = [name for name, x in wrapped.named_parameters() if x.grad is not None and x.grad.abs().max() > 0]
    assert sum("lora_B" in name for name in grads) == 9
    for model in (wrapped, inside):
        with pytest.raises(ValueError, match="the model must hold no adapters to be saved"):
            model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    want = logits(wrapped.eval(), batch)
    wrapped.language_model = wrapped.language_model.merge_and_unload()
    wrapped.save_pretrained(tmp_path)
    again = PalForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, batch), want)


def test_lora_on_the_whole_model(tmp_path):
    """Adapters of the language model alone, saved and loaded as peft does; connectors are trained with them."""
    from peft import LoraConfig, PeftModel, get_peft_model

    entries = [entry("whisper", "plits"), entry("sslam")]
    lora = LoraConfig(
        target_modules=r".*language_model.*(q|v)_proj",
        modules_to_save=["multi_modal_projector.0", "multi_modal_projector.1"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(build_pal(*entries), lora)
    batch = batch_of(adapted.base_model.model)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert {("lora" in name, "multi_modal_projector" in name) for name in trained} == {(True, False), (False, True)}
    for parameter in adapted.base_model.model.multi_modal_projector.parameters():
        parameter.data.mul_(1.1)
    adapted.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_pal(*entries), tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(adapted, batch))
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(**batch, **settings), adapted.generate(**batch, **settings))


@pytest.mark.parametrize("entries", [[entry("sslam")], [entry("whisper", "plits"), entry("sslam")]])
def test_gradient_checkpointing(entries):
    def gradients(checkpoint):
        model = build_pal(*entries, dtype=torch.float64).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        batch = batch_of(model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_autocast():
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    batch = batch_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, batch)
    torch.testing.assert_close(found.float(), logits(model, batch), rtol=0.1, atol=0.2)


class Sounds(torch.utils.data.Dataset):
    """Ten tones, each with a letter of its own for an answer, as a model's inputs without the batch's dimension."""

    def __init__(self, model):
        sounds = [tone(150 * (i + 2)) for i in range(10)]
        found = processor_of(model)([f"{AUDIO_TOKEN}is {'abcdefghij'[i]}" for i in range(10)], sounds, 16_000)
        del found["audio_index"]  # text i hears clip i
        found["labels"] = found["input_ids"].clone()
        found["labels"][:, :-1] = -100
        self.rows = [
            {k: [x[i] for x in v] if isinstance(v, list) else v[i] for k, v in found.items()} for i in range(10)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def collate(rows):
    """What the default collator does, and for a list of tensors."""
    batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        batch[name] = (
            [torch.stack(x) for x in zip(*values, strict=True)] if isinstance(first, list) else torch.stack(values)
        )
    return batch


class UntilLearnt(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        control.should_training_stop = float((logs or {}).get("loss", 1)) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_learns_ten_sounds(kind, tmp_path):
    entries, settings = KINDS[kind]
    model = build_pal(*entries, **settings)
    arguments = TrainingArguments(
        tmp_path, max_steps=80, per_device_train_batch_size=10, learning_rate=5e-3, lr_scheduler_type="constant",
        report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    several = len(model.audio_tower) > 1
    trainer = Trainer(model, arguments, train_dataset=Sounds(model), **({"data_collator": collate} if several else {}))
    trainer.add_callback(UntilLearnt())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 2
    assert min(losses) < 0.1


def test_the_trainer_with_texts_and_clips(tmp_path):
    """The processor as collator; rows without audio; checkpointed layers; a checkpoint is a whole model."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    processor = processor_of(model)
    rows = [{"text": f"{AUDIO_TOKEN}is a", "clips": [tone()]}, {"text": "none", "clips": []}] * 2

    def collate_texts(rows):
        texts, clips = [row["text"] for row in rows], [row["clips"] for row in rows]
        batch = processor(texts, clips, 16_000, padding_side="right")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, save_steps=2, eval_strategy="steps", eval_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False, gradient_checkpointing=True,
    )  # fmt: skip
    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": collate_texts}
    trainer = Trainer(model, arguments, **data, processing_class=processor)
    trainer.train()
    losses = [found["eval_loss"] for found in trainer.state.log_history if "eval_loss" in found]
    assert losses[1] < losses[0]
    saved = tmp_path / "checkpoint-2"
    again, processor = AutoModelForMultimodalLM.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    batch = processor([f"{AUDIO_TOKEN}is"], [tone()], 16_000)
    assert torch.equal(logits(again, batch), logits(model.eval(), batch))


def test_the_language_model_is_attached_as_the_config_says():
    model = build_pal(entry("sslam"), layers=range(1, 3), rope="none", impl="sdpa", recompute_audio_kv=True)
    config = LalConfig(layers=(1, 2), rope="none", impl="sdpa", recompute_audio_kv=True)
    assert attach(model.language_model, config).config == config
    assert not hasattr(build_pal(entry("sslam", "plits")).language_model, "_palkernels_handle")


def config_of(*entries, **settings):
    return PalConfig(text_config=text_config(), encoders=list(entries), **({"audio_token_id": 2} | settings))


def test_config_round_trip(tmp_path):
    config = config_of(
        entry(["sslam", "clap"], "plits", "lfst"), entry("whisper"), layers=(0, 2), rope="none", projection="per_layer"
    )
    assert config.layers == [0, 2]
    again = PalConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert config.get_text_config().vocab_size == len(TOKENIZER)
    short = config_of({"type": "clap", "connector": {"type": "mlp"}}).encoders[0]
    assert short == {"type": "clap", "config": {}, "integration": "lal", "connector": {"type": "mlp", "config": {}}}


WRONG = [
    ((), {}, "encoders must be a list of at least one entry"),
    (({"type": "clap"},), {}, "an entry of encoders must have the keys"),
    ((entry("clap") | {"kind": 1},), {}, "an entry of encoders must have the keys"),
    ((entry("clap") | {"type": "beats"},), {}, 'an encoder\'s type must be "whisper", "clap" or "sslam", got'),
    ((entry("clap") | {"integration": "x"},), {}, "integration must be"),
    ((entry("clap") | {"connector": {"type": "cnn"}},), {}, "a connector's type must be"),
    ((entry("clap") | {"connector": "mlp"},), {}, "connector must be a dict"),
    ((entry("sslam") | {"connector": {"type": "lfst"}},), {}, r"the type must be \['sslam', 'clap'\] for"),
    ((entry(["sslam", "clap"], "lal", "lfst") | {"connector": {"type": "mlp"}},), {}, "the type must be one encoder's"),
    ((entry(["sslam", "clap"], "lal", "lfst") | {"config": {"hidden_size": 8}},), {}, "an encoder's config must be"),
    ((entry("clap") | {"config": {"freeze": True}},), {}, "an encoder's config must not say freeze"),
    ((entry("clap") | {"connector": {"type": "mlp", "config": {"hidden_size": 8}}},), {}, "hidden_size must be the"),
    ((entry("clap"),), {"layers": [3]}, "layers must be from 0 to 2"),
    ((entry("clap"),), {"layers": "some"}, 'layers must be "all" or layer indices'),
    ((entry("clap"),), {"rope": "x"}, 'rope must be "sequence" or "none"'),
    ((entry("clap"),), {"impl": "x"}, "impl must be one of"),
    ((entry("clap"),), {"projection": "x"}, "projection must be"),
    ((entry("clap", "plits"),), {"projection": "per_layer"}, 'projection must be "shared" where no audio'),
    ((entry("clap", "plits"),), {"summary_tokens": 2}, "summary_tokens must be 0 unless one encoder"),
    ((entry("clap"),), {"summary_tokens": -1}, "summary_tokens must be an integer, at least 0"),
    ((entry("clap", "plits"),), {"audio_token_id": None}, "audio_token_id must be given where audio enters by PLITS"),
    ((entry("clap"),), {"audio_token_id": 259}, "audio_token_id must be from 0 to 258, got 259"),
    ((entry("clap"), entry("sslam", "flamingo")), {}, "audio must enter by LAL or by Flamingo, besides PLITS, got"),
    ((entry("clap"),), {"flamingo": {"every": 2}}, "flamingo must be a dict where audio enters by it, else None"),
    ((entry("clap"),), {"freeze_ffn": 1}, "freeze_ffn must be a bool"),
    ((entry("clap"),), {"text_config": {"hidden_size": 8}}, "text_config must have a model_type"),
    ((entry("clap"),), {"text_config": None}, "text_config must be a config or a dict"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "settings", "message"), WRONG, ids=range(len(WRONG)))
def test_configs_that_do_not_fit_are_refused(entries, settings, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        PalConfig(**{"text_config": text_config(), "encoders": list(entries), "audio_token_id": 2, **settings})
    assert "\n" not in str(caught.value)
