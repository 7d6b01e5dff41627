"""States of frozen encoders in place of what the encoders hear."""

import inspect

import pytest
import torch
from support.audio_llm import (
    INTEGRATIONS,
    batch_of,
    batch_of_two,
    build_pal,
    entry,
    forbid_towers,
    labelled,
    logits,
    open_gates,
    tone,
)
from transformers import DynamicCache, Trainer, TrainingArguments

from palkernels.model import PalForConditionalGeneration


def with_states(model, batch):
    """The batch with what each tower makes of its features in their place, and towers that must not run."""
    features = batch["input_features"]
    features = features if isinstance(features, list) else [features]
    with torch.no_grad():
        states = [tower(clips) for tower, clips in zip(model.audio_tower, features, strict=True)]
    return {name: value for name, value in batch.items() if name != "input_features"} | {
        "encoder_states": states if len(states) > 1 else states[0]
    }


@pytest.mark.parametrize("kind", INTEGRATIONS)
def test_they_give_what_the_features_give_bitwise(kind):
    """In forward, in training, and in generate with beams; no tower runs."""
    entries, settings = INTEGRATIONS[kind]
    model = open_gates(build_pal(*entries, **settings))
    batch = labelled(batch_of(model))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "num_beams": 2}

    def results(inputs):
        model.zero_grad()
        outputs = model.train()(**inputs)
        outputs.loss.backward()
        gradients = [weight.grad.clone() for weight in model.multi_modal_projector.parameters()]
        model.eval()
        text = {name: value for name, value in inputs.items() if name != "labels"}
        return [outputs.logits.detach(), *gradients, logits(model, text), model.generate(**text, **options)]

    want = results(batch)
    stated = with_states(model, batch)
    forbid_towers(model)
    for got, expected in zip(results(stated), want, strict=True):
        assert torch.equal(got, expected)


def test_what_is_not_valid_may_be_cut_off_or_hold_anything():
    """As a cache keeps them: up to the longest clip, with the rest of shorter ones as memory happens to be."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    batch = batch_of(model, audio=[tone(), tone(300, 0.5), tone(700, 0.07)])
    want = logits(model, batch)
    stated = with_states(model, batch)
    lengths = batch["audio_lengths"]
    cut = []
    for states, valid in zip(stated["encoder_states"], lengths.unbind(1), strict=True):
        kept = states[:, : int(valid.max())].clone()
        kept[torch.arange(kept.shape[1]) >= valid.unsqueeze(1)] = torch.nan
        cut.append(kept)
    assert [states.shape[1] for states in cut] == [25, 24]
    assert torch.equal(logits(model, stated | {"encoder_states": cut}), want)


def test_a_cache_that_heard_them_goes_on():
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    batch = batch_of_two(model)
    stated = with_states(model, batch)
    forbid_towers(model)
    cache = DynamicCache()
    whole = logits(model, stated)
    start = batch["input_ids"].shape[1] - 2
    first = {name: stated[name][:, :start] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**stated | first, past_key_values=cache)
        last = model(stated["input_ids"][:, start:], stated["attention_mask"], past_key_values=cache).logits
    torch.testing.assert_close(last, whole[:, start:], rtol=1e-4, atol=1e-5)


def test_the_trainer_keeps_the_column(tmp_path):
    model = build_pal(entry("sslam"))
    stated = labelled(with_states(model, batch_of_two(model)))
    assert "encoder_states" in inspect.signature(PalForConditionalGeneration.forward).parameters
    forbid_towers(model)
    options = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    rows = [{name: value[i] for name, value in stated.items()} for i in range(2)]
    before = model.multi_modal_projector[0].linear_1.weight.clone()
    Trainer(model, options, train_dataset=rows).train()
    assert not torch.equal(before, model.multi_modal_projector[0].linear_1.weight)


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_what_does_not_fit_is_refused(run):
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    batch = batch_of(model)
    stated = with_states(model, batch)
    whisper, sslam = stated["encoder_states"]
    call = model if run == "forward" else model.generate
    for states, error, message in (
        (whisper, ValueError, "encoder_states must hold a tensor for each of 2 towers, got 1"),
        ([whisper, sslam.long()], TypeError, r"encoder_states\[1\] must be a tensor of floats, got torch.int64"),
        ([whisper[0], sslam], ValueError, r"\[0\] must be \(W, 1 to 1500, 16\), got shape \(1500, 16\)"),
        ([whisper, sslam[..., :8]], ValueError, r"\[1\] must be \(W, 1 to 512, 16\), got shape \(3, 512, 8\)"),
        ([torch.cat([whisper, whisper], 1), sslam], ValueError, r"got shape \(3, 3000, 16\)"),
        ([whisper[:0], sslam[:0]], ValueError, "encoder_states must hold at least one clip, got none"),
        ([whisper[:, :3], sslam], ValueError, "lengths must be from 0 to 3"),
    ):
        with pytest.raises(error, match=message):
            call(**stated | {"encoder_states": states})
    with pytest.raises(ValueError, match=r"one of input_features, .*got input_features and encoder_states"):
        call(**batch, encoder_states=stated["encoder_states"])
    with pytest.raises(ValueError, match="audio must be input_features or encoder_states, got neither"):
        model.get_audio_features()


def test_an_encoder_that_trains_must_run():
    """Its weights would get no gradient, and nobody would notice."""
    model = build_pal(entry("sslam"), freeze_encoders=False).train()
    stated = with_states(model, labelled(batch_of(model)))
    with pytest.raises(ValueError, match="encoder_states must come of encoders that do not train, got some that do"):
        model(**stated)
    with torch.no_grad():
        assert model(**stated).loss.isfinite()
