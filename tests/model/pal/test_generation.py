"""Generation is the forward without a cache: greedy, by beams, and when a conversation goes on."""

import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, TEXTS, batch_of, build_mixed, build_pal, entry, three_clips, tone
from transformers import StaticCache

from palkernels.model import AudioFeatures

WAYS = ["lal", "plits", "plits+lal", "plits+flamingo"]


@pytest.mark.parametrize("name", WAYS)
def test_generation_is_the_forward_without_a_cache(name, monkeypatch):
    model = build_mixed(name)
    batch = batch_of(model)
    calls = []
    real = model.audio_tower[0].forward
    monkeypatch.setattr(model.audio_tower[0], "forward", lambda x: calls.append(1) or real(x))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    got = model.generate(**batch, **settings)
    assert len(calls) == 1  # the audio is encoded once
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        for _ in range(4):
            rest = {name: x for name, x in batch.items() if name not in ("input_ids", "attention_mask")}
            logits = model(input_ids=ids, attention_mask=mask, **rest, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(got, ids)
    assert torch.equal(model.generate(**batch, **settings, cache_implementation="static", disable_compile=True), got)


@pytest.mark.parametrize("name", WAYS)
def test_beams_and_samples(name):
    model = build_mixed(name)
    batch = batch_of(model)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **settings)
    for b, own in enumerate([three_clips()[:1], three_clips()[1:], []]):
        alone = model.generate(**batch_of(model, [TEXTS[b]], own), **settings)
        assert together[b, -4:].tolist() == alone[0, -4:].tolist()
    torch.manual_seed(1)
    sampled = model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert sampled.shape == (6, batch["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("name", WAYS)
def test_a_conversation_goes_on_with_its_cache(name):
    """A second question about a second clip is answered as from the start, without computing the first text again."""
    model = build_mixed(name)
    first, second = tone(), tone(300, 0.06)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    start = batch_of(model, [f"one {AUDIO_TOKEN}?"], [first])
    begun = model.generate(**start, **settings, return_dict_in_generate=True)
    more = batch_of(model, [f"one {AUDIO_TOKEN}?{AUDIO_TOKEN} two?"], [first, second])
    prompt = start["input_ids"].shape[1]
    # The answer's tokens, as they are, between the first question and the second.
    answer = begun.sequences[:, prompt:]
    more["input_ids"] = torch.cat([more["input_ids"][:, :prompt], answer, more["input_ids"][:, prompt:]], dim=1)
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    more["insert_at"][:, 1] += 3
    want = model.generate(**more, **settings)
    lengths = []
    hook = model.language_model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    got = model.generate(**more, **settings, past_key_values=begun.past_key_values)
    hook.remove()
    assert torch.equal(got, want)
    assert lengths[0] == more["input_ids"].shape[1] - prompt - 2  # the last answer token was never fed


def test_features_are_used_again_and_stepwise():
    """audio_features in place of input_features give the same, and so does a loop of forwards with a cache."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), dtype=torch.float64)
    batch = batch_of(model, TEXTS[:1], three_clips()[:1])
    with torch.no_grad():
        features = model.get_audio_features(batch.pop("input_features"), batch.pop("audio_lengths"))
        assert isinstance(features, AudioFeatures)
        want = model.generate(**batch, audio_features=features, max_new_tokens=3, do_sample=False, eos_token_id=None)
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        ids, mask, new = batch["input_ids"], batch["attention_mask"], batch["input_ids"]
        rest = {"insert_at": batch["insert_at"], "audio_features": features, "past_key_values": cache}
        for _ in range(3):
            logits = model(input_ids=new, attention_mask=mask, **rest).logits
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(ids, want)
