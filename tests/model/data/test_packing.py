"""Several samples in one row without padding: losses and gradients are those of the padded batch."""

import pytest
import torch
from support.audio_llm import INTEGRATIONS, entry
from support.samples import model_and_processor, sample, small_processor, write_clip
from transformers import Trainer, TrainingArguments

from palkernels.model.data.collator import Collator

WAYS = {name: parts for name, parts in INTEGRATIONS.items() if name != "flamingo"} | {
    "plits+plits": ([entry("whisper", "plits"), entry("sslam", "plits")], {})
}


@pytest.fixture
def samples(tmp_path):
    """With one clip, none, two, and one that another hears, too; of different lengths."""
    clips = [write_clip(tmp_path / f"{i}.wav", 0.05 + 0.05 * i, 300 + 100 * i) for i in range(3)]
    return [
        sample(clips[:1], "a", "red"),
        sample([], "Is there none?", "no"),
        sample(clips[1:], "b", "blue or so"),
        sample(clips[:1], "ccc", "g"),
    ]


def run(model, batch):
    """The mean loss in float64 over what is learned, and its gradients."""
    model.zero_grad()
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    losses.backward()
    assert losses.dtype == torch.float64
    return losses.detach(), {n: w.grad for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_the_padded_batchs(way, samples):
    encoders, settings = WAYS[way]
    model, processor = model_and_processor(*encoders, dtype=torch.float64, **settings)
    model.train()
    packed = Collator(processor, packing=True)(samples)
    padded = Collator(processor)(samples)
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert "attention_mask" not in packed
    got, gradients = run(model, packed)
    want, expected = run(model, padded)
    assert float((got - want).abs()) <= 1e-9
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_nothing_is_learned_across_texts(samples):
    """Each text's first token has no label, which the token before it, another text's last, would foretell."""
    processor = small_processor()
    processor.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    packed = Collator(processor, packing=True)([one for one in samples if not one.clips()] * 3)
    first = packed["position_ids"] == 0
    assert int(first.sum()) == 3
    assert bool((packed["labels"][first] == -100).all())
    assert bool((packed["labels"][~first] != -100).all())


def test_texts_alone(samples):
    model, processor = model_and_processor(entry("whisper"), dtype=torch.float64)
    alone = [samples[1], sample(answer="blue")]
    (got, gradients), (want, expected) = (
        run(model, Collator(processor, packing=packing)(alone)) for packing in (True, False)
    )
    assert float((got - want).abs()) <= 1e-9
    assert gradients.keys() == expected.keys()


@pytest.mark.parametrize("way", ["lal", "plits", "summary"])
def test_a_trainer_logs_the_loss_of_the_padded_batch(way, samples, tmp_path):
    encoders, settings = WAYS[way]
    losses = []
    for packing in (True, False):
        model, processor = model_and_processor(*encoders, **settings)
        arguments = TrainingArguments(
            tmp_path / str(packing), max_steps=2, learning_rate=0.0, logging_steps=1, report_to=[], disable_tqdm=True,
            save_strategy="no", use_cpu=True, remove_unused_columns=False, per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        collate = Collator(processor, packing=packing)
        trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=collate)
        trainer.train()
        losses.append([found["loss"] for found in trainer.state.log_history if "loss" in found])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_rows_that_are_not_packed_so(samples):
    model, processor = model_and_processor(*WAYS["plits"][0])
    packed = Collator(processor, packing=True)(samples)
    with pytest.raises(ValueError, match="position_ids must count each of 4 texts of audio_index from 0, got 1"):
        model(**packed | {"position_ids": torch.arange(packed["input_ids"].shape[1])[None]})
    with pytest.raises(ValueError, match=r"audio_index must be \(B, K\) with B = 1, got shape \(4, 2\)"):
        model(**packed | {"position_ids": None})
    encoders, settings = INTEGRATIONS["flamingo"]
    model, processor = model_and_processor(*encoders, **settings)
    with pytest.raises(ValueError, match="for packed sequences audio must enter by LAL"):
        model(**Collator(processor, packing=True)(samples))
