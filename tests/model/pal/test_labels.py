"""Labels that are final before forward: whatever the Trainer counts, smooths or evaluates is the text's own loss."""

import pytest
import torch
from support.audio_llm import AUDIO_ID, AUDIO_TOKEN, build_pal, entry, labelled, processor_of, tone
from transformers import Trainer, TrainingArguments

ENTRIES = {
    "plits": ([entry("whisper", "plits")], {}),
    "lal": ([entry("sslam")], {}),
    "unified": ([entry("whisper")], {"summary_tokens": 3}),
}
ROWS = [{"text": f"{AUDIO_TOKEN}is {'abcd'[i] * (1 + 4 * (i % 3))}", "seconds": 0.1 + 0.2 * (i % 3)} for i in range(4)]


def collator(model):
    processor = processor_of(model)

    def collate(rows):
        clips = [tone(200 + 300 * row["seconds"], row["seconds"]) for row in rows]
        return labelled(dict(processor([row["text"] for row in rows], clips, 16_000, padding_side="right")))

    return collate


def trainer_of(model, folder, **settings):
    arguments = TrainingArguments(
        folder, max_steps=1, learning_rate=0.0, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no",
        use_cpu=True, remove_unused_columns=False, per_device_eval_batch_size=4, **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS, data_collator=collator(model))


@torch.no_grad()
def text_loss(model, smoothing=0.0):
    """The float64 cross-entropy over the tokens of all texts, without their placeholders and padding."""
    batch = collator(model)(ROWS)
    model = model.double().eval()
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits[:, :-1]
    tokens = batch["input_ids"][:, 1:]
    counts = (batch["attention_mask"][:, 1:] != 0) & (tokens != AUDIO_ID)
    log_probs = logits.log_softmax(-1)[counts]
    loss = -log_probs.gather(-1, tokens[counts][:, None]).mean()
    model.float()
    return float((1 - smoothing) * loss - smoothing * log_probs.mean())


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", ENTRIES)
def test_the_loss_of_the_trainer(name, batch, tmp_path):
    """With gradient accumulation over batches of texts and clips of different lengths, too."""
    entries, settings = ENTRIES[name]
    model = build_pal(*entries, **settings)
    want = text_loss(model)
    trainer = trainer_of(
        model, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch
    )  # fmt: skip
    trainer.train()
    got = next(found["loss"] for found in trainer.state.log_history if "loss" in found)
    assert got == pytest.approx(want, abs=1e-3)  # it is logged with four digits
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ENTRIES)
def test_smoothed_labels(name, tmp_path):
    """The Trainer takes labels out of the batch and smooths them itself: shifted, as the model would shift them."""
    entries, settings = ENTRIES[name]
    model = build_pal(*entries, **settings)
    want = text_loss(model, 0.2)
    trainer = trainer_of(
        model, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, label_smoothing_factor=0.2
    )
    trainer.train()
    got = next(found["loss"] for found in trainer.state.log_history if "loss" in found)
    assert got == pytest.approx(want, abs=1e-3)
