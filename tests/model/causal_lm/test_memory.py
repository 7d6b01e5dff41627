"""A cache remembers what its texts have heard, so that a conversation can go on without giving its audio again."""

import copy

import pytest
import torch
from support.attached import WIDTH, attached, texts, unpadded
from support.oracles import build
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
    if cache.get_seq_length() == 0:  # transformers 5.17 keeps the length
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
