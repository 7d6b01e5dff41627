"""A cache remembers what its texts have heard, so that a conversation can go on without giving its audio again."""

import copy
import logging

import pytest
import torch
from support.attached import WIDTH, attached, texts, unpadded
from support.oracles import build
from support.releases import IS_NEWEST
from transformers import DynamicCache, StaticCache

from palkernels.model import AudioState, attach, attach_flamingo
from palkernels.model.causal_lm.memory import memory_of

OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def cache_of(model, kind):
    return StaticCache(model.config, max_cache_len=48) if kind == "static" else DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("way", ["lal", "flamingo"])
@torch.no_grad()
def test_a_second_turn_without_the_audio(way, kind):
    """By the whole conversation's ids, by its new ones, by a forward, and in a copy of the cache."""
    model = build("llama", torch.float64)
    if way == "lal":
        attach(model)
    else:
        for layer in attach_flamingo(model, every=1).layers.values():
            layer.attention_gate.data.fill_(0.7)
    audio = AudioState(torch.randn(1, 5, WIDTH, dtype=torch.float64), insert_at=torch.tensor([2]))
    cache = cache_of(model, kind)
    first = model.generate(texts()[0][None], audio=audio, past_key_values=cache, **OPTIONS)
    turn, cached = torch.cat([first, texts()[1][None]], dim=1), int(cache.get_seq_length())
    want = model.generate(turn, audio=audio, **OPTIONS)
    deaf = model.generate(turn, **OPTIONS)
    assert not torch.equal(want, deaf)
    assert torch.equal(model.generate(turn, past_key_values=copy.deepcopy(cache), **OPTIONS), want)
    new = {"input_ids": turn[:, cached:], "attention_mask": torch.ones_like(turn)}
    got = model.generate(**new, past_key_values=copy.deepcopy(cache), **OPTIONS)
    assert torch.equal(got[:, -4:], want[:, -4:])
    logits = model(**new, past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(logits, model(turn, audio=audio).logits[:, cached:])
    less = AudioState(audio.states[:, :4], insert_at=audio.insert_at)  # as where the clips before were left out
    with pytest.raises(ValueError, match=r"must be all that the conversation has heard, \[5\] tokens .*got \[4\]"):
        model.generate(turn, audio=less, past_key_values=copy.deepcopy(cache), **OPTIONS)
    cache.reset()
    assert memory_of(cache) is None
    if IS_NEWEST or cache.get_seq_length() == 0:  # transformers 5.17 keeps the length
        assert torch.equal(model.generate(turn, past_key_values=cache, **OPTIONS), deaf)


@torch.no_grad()
def test_a_loop_by_hand():
    """The first forward is given the audio, the next ones find it: the logits of one forward."""
    model, keywords = attached("qwen2", "shared, inserted")
    ids, mask = keywords["input_ids"], keywords["attention_mask"]
    whole = model(**keywords, use_cache=False).logits
    out = model(ids[:, :5], attention_mask=mask[:, :5], audio=keywords["audio"])
    parts = [out.logits]
    for end in range(6, ids.shape[1] + 1):
        out = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=out.past_key_values)
        parts.append(out.logits)
    torch.testing.assert_close(unpadded(torch.cat(parts, 1), mask), unpadded(whole, mask), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_that_are_chosen_and_repeated():
    model, keywords = attached("llama", "shared, inserted")
    out = model(**keywords)
    cache, mask = out.past_key_values, keywords["attention_mask"]
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    rows = rows.repeat_interleave(2).flip(0)
    new = torch.full((4, 1), 7)
    longer = torch.nn.functional.pad(mask[rows], (0, 1), value=1)
    state = keywords["audio"]
    own = AudioState(state.states, state.lengths, state.index[rows], state.insert_at[rows])
    ids = torch.cat([keywords["input_ids"][rows], new], dim=1)
    want = model(ids, attention_mask=longer, audio=own).logits[:, -1:]
    got = model(new, attention_mask=longer, past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="audio must be given again: the cache has heard it for 4 text rows, got 3"):
        model(new[:3], past_key_values=cache)


@torch.no_grad()
def test_a_conversation_of_text_alone_is_the_stock_models():
    model = build("llama")
    ids = texts()[0][None]
    want = model.generate(ids, **OPTIONS)
    attach(model)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=cache)
    assert memory_of(cache) is None
    assert torch.equal(model.generate(ids, past_key_values=cache, **OPTIONS), want)


@pytest.mark.parametrize("layout", ["shared", "per row", "per layer"])
@torch.no_grad()
def test_audio_goes_with_the_text_that_is_cropped_off(layout):
    """A cache that is cropped to what rows share, as where a question is asked anew: each row keeps the audio tokens
    that stand in front of its last token that is left."""
    model, keywords = attached("llama", "shared, inserted")
    ids, mask = keywords["input_ids"], keywords["attention_mask"]
    text_lengths, columns = mask.sum(1), ids.shape[1]
    shape = {"shared": (2, 3, WIDTH), "per row": (3, 3, WIDTH), "per layer": (3, 3, WIDTH)}[layout]
    states = torch.randn(shape)
    index = torch.tensor([1, 0, 0]) if layout == "shared" else None
    places = torch.tensor([[0, 4, 5], [0, 1, 2], [3, 6, 7]])
    given = [states, states + 1, states - 1] if layout == "per layer" else states
    cache = DynamicCache(config=model.config)
    model(**keywords | {"audio": AudioState(given, index=index, insert_at=places)}, past_key_values=cache)
    cache.crop(-3)
    left = text_lengths - 3  # of 7, 4 and 9 tokens: 4, 1 and 6
    assert left.tolist() == [4, 1, 6]
    kept = torch.tensor([1, 1, 1])  # audio tokens in front of tokens 4, 1 and 6
    rows = [0, 1, 2] if index is None else index
    per_row = [x[rows] for x in given] if layout == "per layer" else states[rows]
    turn = torch.cat([ids[:, : columns - 3], torch.full((3, 2), 7)], dim=1)
    turn = {"input_ids": turn, "attention_mask": mask[:, : turn.shape[1]]}
    want = model(**turn, audio=AudioState(per_row, kept, insert_at=places)).logits[:, -2:]
    new = turn | {"input_ids": turn["input_ids"][:, -2:]}
    again = copy.deepcopy(cache)
    again.batch_select_indices(torch.tensor([0, 1, 2]))
    got = model(**new, past_key_values=again).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    cache.crop(3 - columns)
    assert memory_of(cache) is None
    assert torch.equal(model.generate(**turn, past_key_values=cache, **OPTIONS), model.generate(**turn, **OPTIONS))


@torch.no_grad()
def test_audio_behind_a_prompt_outlives_the_drafts_that_are_cropped_off():
    model = build("llama", torch.float64)
    attach(model)
    ids = texts()[0][None]
    audio = AudioState(torch.randn(1, 5, WIDTH, dtype=torch.float64), insert_at=torch.tensor([ids.shape[1]]))
    cache = DynamicCache(config=model.config)
    drafts = {"assistant_model": build("llama", torch.float64, seed=1)}
    turn = torch.cat([model.generate(ids, audio=audio, past_key_values=cache, **drafts, **OPTIONS), ids], dim=1)
    want = model.generate(turn, audio=audio, **OPTIONS)
    assert torch.equal(model.generate(turn, past_key_values=cache, **OPTIONS), want)


@torch.no_grad()
def test_a_crop_that_removes_nothing_forgets_nothing():
    model = build("llama", torch.float64)
    attach(model)
    ids = texts()[0][None]
    audio = AudioState(torch.randn(1, 5, WIDTH, dtype=torch.float64), insert_at=torch.tensor([ids.shape[1]]))
    cache = DynamicCache(config=model.config)
    model(ids, audio=audio, past_key_values=cache)
    try:
        cache.crop(ids.shape[1])
    except ValueError:  # transformers has it count what goes now, not what stays
        cache.crop(0)
    got = model(ids[:, :2], past_key_values=cache).logits
    want = model(torch.cat([ids, ids[:, :2]], dim=1), audio=audio).logits[:, -2:]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_forward_warns_of_the_names_of_caches(use_cache, monkeypatch):
    """A user can do nothing about them. Training keeps no cache."""
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, message, *rest: said.append(message))
    model = build("llama", torch.float64)
    attach(model)
    audio = AudioState(torch.randn(1, 5, WIDTH, dtype=torch.float64))
    model(texts()[0][None], audio=audio, use_cache=use_cache)
    assert said == []
