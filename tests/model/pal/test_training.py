"""An audio LLM trained by other people's loops, with their adapters."""

import pytest
import torch
from support.audio_llm import (
    AUDIO_TOKEN,
    INTEGRATIONS,
    batch_of,
    batch_of_two,
    build_pal,
    entry,
    labelled,
    logits,
    open_gates,
    processor_of,
    tone,
)
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from palkernels.model import PalForConditionalGeneration


def test_what_is_trained():
    def gradients(**settings):
        model = build_pal(entry("whisper", "plits"), entry("sslam"), **settings).train()
        batch = batch_of_two(model)
        model(**labelled(batch)).loss.backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, encoders, ffn = gradients(), gradients(freeze_encoders=False), gradients(freeze_ffn=True)
    assert not any(name.startswith("audio_tower") for name in plain)
    assert {name.split(".")[1] for name in plain if name.startswith("multi_modal")} == {"0", "1"}
    assert {name.split(".")[1] for name in encoders - plain} == {"0", "1"}
    assert {name.split(".")[-3] for name in plain - ffn} == {"mlp"}


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", INTEGRATIONS)
@pytest.mark.parametrize("clips", [0, 1])
def test_audio_parts_that_are_frozen(kind, clips):
    """The language model alone trains: losses are those of evaluation, with audio and without."""
    entries, settings = INTEGRATIONS[kind]
    model = open_gates(build_pal(*entries, **settings)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("language_model"))
    texts = [f"{AUDIO_TOKEN * clips}hello", "none"]
    batch = labelled(batch_of(model, texts, [tone()] * clips))
    loss = model(**batch).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.language_model.parameters())
    torch.testing.assert_close(model.eval()(**batch).loss, loss)


@pytest.mark.parametrize("kind", INTEGRATIONS)
def test_a_batch_without_audio_gives_its_parts_gradients_of_zero(kind):
    """And nothing else: loss and all other gradients are bitwise the language model's own. With audio, none is left
    out either, where no text hears the clip."""
    entries, settings = INTEGRATIONS[kind]
    model = open_gates(build_pal(*entries, freeze_encoders=False, **settings)).train()
    text = labelled(batch_of(model, ["hello", "none"], []))
    with torch.no_grad():
        for connector in model.multi_modal_projector:
            next(connector.parameters()).fill_(torch.inf)  # 0 times it would be NaN
    want = model.language_model(**text).loss
    want.backward()
    stock = {name: x.grad.clone() for name, x in model.language_model.named_parameters()}
    for arguments in (text, {"inputs_embeds": model.get_input_embeddings()(text["input_ids"]), **text}):
        if "inputs_embeds" in arguments:
            del arguments["input_ids"]
        model.zero_grad()
        loss = model(**arguments).loss
        assert torch.equal(loss, want)
        loss.backward()
        for name, parameter in trained(model).items():
            expected = stock.get(name.removeprefix("language_model."), torch.zeros_like(parameter))
            assert torch.equal(parameter.grad, expected), name
    model = build_pal(*entries, freeze_encoders=False, **settings).train()
    clip = batch_of(model, [f"{AUDIO_TOKEN}is a"], [tone()])["input_features"]
    model(**text, input_features=clip, audio_index=torch.full((2, 1), -1)).loss.backward()
    assert [name for name, parameter in trained(model).items() if parameter.grad is None] == []


def test_lora_on_the_language_model(tmp_path):
    """Adapters in place or around the language model give the same, and they act on audio."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    entries = [entry("whisper", "plits"), entry("sslam")]
    wrapped, inside = build_pal(*entries), build_pal(*entries)
    batch = batch_of_two(wrapped)
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
    wrapped.train()(**labelled(batch)).loss.backward()
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
    """Adapters of the language model are saved and loaded as peft does, and connectors train with them."""
    from peft import LoraConfig, PeftModel, get_peft_model

    entries = [entry("whisper", "plits"), entry("sslam")]
    lora = LoraConfig(
        target_modules=r".*language_model.*(q|v)_proj",
        modules_to_save=["multi_modal_projector.0", "multi_modal_projector.1"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(build_pal(*entries), lora)
    batch = batch_of_two(adapted.base_model.model)
    adapted(**labelled(batch)).loss.backward()
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
        batch = batch_of_two(model)
        model(**labelled(batch)).loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_autocast():
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    batch = batch_of_two(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, batch)
    torch.testing.assert_close(found.float(), logits(model, batch), rtol=0.1, atol=0.2)


class Sounds(torch.utils.data.Dataset):
    """Ten tones, each with its letter for an answer, as a model's inputs without the batch dimension."""

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
    """Stack examples as the default collator does, and lists of tensors item by item."""
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


@pytest.mark.parametrize("kind", INTEGRATIONS)
def test_the_trainer_learns_ten_sounds(kind, tmp_path):
    entries, settings = INTEGRATIONS[kind]
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
    """The processor collates, some texts have no audio, layers are checkpointed, and a checkpoint is a whole model."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    processor = processor_of(model)
    rows = [{"text": f"{AUDIO_TOKEN}is a", "clips": [tone()]}, {"text": "none", "clips": []}] * 2

    def collate_texts(rows):
        texts, clips = [row["text"] for row in rows], [row["clips"] for row in rows]
        batch = processor(texts, clips, 16_000, padding_side="right")
        return labelled(dict(batch))

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


@pytest.mark.parametrize("with_processor", [True, False])
def test_the_trainer_that_generates(with_processor, tmp_path):
    """It pads what was generated, as the config or the processor says."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    processor = processor_of(model)
    texts, clips = [f"{AUDIO_TOKEN}is", f"{AUDIO_TOKEN}is it"], [tone(), tone(300)]
    rows = [{"text": text, "clip": clip} for text, clip in zip(texts, clips, strict=True)]

    def collate_prompts(rows):
        batch = dict(processor([row["text"] for row in rows], [row["clip"] for row in rows], 16_000))
        return labelled(batch)

    arguments = Seq2SeqTrainingArguments(
        tmp_path, per_device_eval_batch_size=2, predict_with_generate=True, generation_max_length=40, report_to=[],
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    settings = {"processing_class": processor} if with_processor else {}
    trainer = Seq2SeqTrainer(model, arguments, data_collator=collate_prompts, **settings)
    found = trainer.predict(rows).predictions
    want = model.generate(**processor(texts, clips, 16_000), max_length=40)
    assert found.shape == (2, 40)
    assert (found[:, : want.shape[1]] == want.numpy()).all()
    assert (found[:, want.shape[1] :] == model.config.pad_token_id).all()
