"""Growing, preallocated and sliding-window caches, by generate and by hand: the same tokens and logits."""

import pytest
import torch
from support.attached import (
    WIDTH,
    attached,
    audio_state,
    batch,
    largest_difference,
    texts,
    unpadded,
)
from support.oracles import FAMILIES, build
from support.thorough import combinations
from transformers import (
    DynamicCache,
    StaticCache,
)

from palkernels.model import AudioState, attach
from palkernels.model.causal_lm.texts import count_cached


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prefix", "two clips", "shared, inserted"])
@torch.no_grad()
def test_static_cache(family, kind):
    """A preallocated cache, longer than the text, gives the tokens of one that grows, also past a window."""
    model, keywords = attached(family, kind)
    want = model.generate(**keywords, max_new_tokens=8, do_sample=False)
    static = model.generate(**keywords, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(static, want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_beams_with_a_static_cache(family):
    model, keywords = attached(family, "shared, inserted")
    options = keywords | {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options, cache_implementation="static"), model.generate(**options))


def test_a_static_cache_counts_on_the_models_device():
    """An empty one counts in Python: its count must not end up on the CPU beside a model elsewhere."""
    cache = StaticCache(build("llama").config, max_cache_len=8)
    assert count_cached(cache, torch.device("meta")).device.type == "meta"


@torch.no_grad()
def test_a_mask_shorter_than_a_static_caches_keys_is_refused():
    """How many keys there are is counted on the device; the mask's last columns would be missing."""
    model, keywords = attached("llama", "prefix")
    cache, mask = StaticCache(model.config, max_cache_len=12), keywords["attention_mask"]
    model(**keywords, past_key_values=cache)
    step = keywords | {"input_ids": keywords["input_ids"][:, :1], "past_key_values": cache}
    with pytest.raises(ValueError, match=r"must be 2-D with audio, \(B, past \+ T\) = \(3, 10\), got \(3, 9\)"):
        model(**step | {"attention_mask": mask})
    model(**step | {"attention_mask": torch.cat([mask, mask[:, -1:]], dim=1)})


@pytest.mark.parametrize(("compiled", "kind"), combinations([False, True], ["prefix", "shared, inserted"]))
@torch.no_grad()
def test_static_decoding_by_hand(compiled, kind):
    """A loop over forward with a preallocated cache and one mask for all steps, in whole graphs or without: the logits
    of one forward."""
    model, keywords = attached("llama", kind, layers=2)
    padded, mask, state = keywords.values()
    whole = model(**keywords, use_cache=False).logits
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    cache = StaticCache(model.config, max_cache_len=12)
    full = torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], dim=1)
    parts = [model(padded[:, :5], attention_mask=full, audio=state, past_key_values=cache).logits]
    for t in range(5, padded.shape[1]):
        out = step(padded[:, t : t + 1], attention_mask=full, audio=state, past_key_values=cache)
        parts.append(out.logits)
    assert largest_difference(unpadded(torch.cat(parts, 1), mask), unpadded(whole, mask)) <= 1e-5


@torch.no_grad()
def test_cached_decoding_by_hand():
    """A loop over forward with a growing cache gives what one forward gives."""
    model = build("qwen2-window")
    _, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    attach(model)
    whole = model(padded, attention_mask=mask, audio=state, use_cache=False).logits
    out = model(padded[:, :5], attention_mask=mask[:, :5], audio=state, use_cache=True)
    parts = [out.logits]
    for t in range(5, padded.shape[1]):
        out = model(
            padded[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            audio=state,
            past_key_values=out.past_key_values,
        )
        parts.append(out.logits)
    assert largest_difference(unpadded(torch.cat(parts, 1), mask), unpadded(whole, mask)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_conversation_that_continues_a_cache(family, cache):
    """The second turn brings a second clip; audio is told from the start, the cache holds the text only."""
    model = build(family)
    attach(model)
    question, clip, second_clip = texts()[0][None], torch.randn(1, 4, WIDTH), torch.randn(1, 3, WIDTH)
    kept = StaticCache(model.config, max_cache_len=40) if cache == "static" else DynamicCache(config=model.config)
    options = {"max_new_tokens": 3, "do_sample": False, "past_key_values": kept}
    first = model.generate(question, audio=AudioState(clip, insert_at=torch.tensor([1])), **options)
    turn = torch.cat([first, texts()[1][None]], dim=1)
    places = torch.tensor([[1, 1, 1, 1, *[first.shape[1] + 1] * 3]])
    both = AudioState(torch.cat([clip, second_clip], dim=1), insert_at=places)
    continued = model.generate(turn, audio=both, **options)
    whole = model.generate(turn, audio=both, max_new_tokens=3, do_sample=False)
    assert torch.equal(continued, whole)
