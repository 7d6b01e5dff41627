"""A cache that is cropped to what several questions share, such as a system's message: the next one is asked anew."""

import copy

import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, batch_of, build_pal, entry, open_gates, processor_of, tone
from transformers import DynamicCache

ENTRIES = {
    "lal": ([entry("whisper")], {}),
    "plits": ([entry("whisper", "plits")], {}),
    "unified": ([entry("whisper")], {"summary_tokens": 3}),
    "flamingo": ([entry("sslam", "flamingo")], {"flamingo": {"every": 1}}),
}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
SHARED = f"first {AUDIO_TOKEN} and "
FIRST, SECOND = tone(), tone(300, 0.2)


@pytest.mark.parametrize("name", ENTRIES)
@torch.no_grad()
def test_clips_go_with_the_text_that_is_cropped_off(name):
    """The next question has no clip, or a shorter one; the clip in front of the cut is still heard."""
    entries, settings = ENTRIES[name]
    model = open_gates(build_pal(*entries, dtype=torch.float64, **settings))
    shared = batch_of(model, [SHARED], [FIRST])["input_ids"].shape[1]
    cache = DynamicCache(config=model.config.text_config)
    asked = batch_of(model, [f"{SHARED}then {AUDIO_TOKEN}?"], [FIRST, SECOND])
    model.generate(**asked, **GREEDY, past_key_values=cache)
    cache.crop(shared - cache.get_seq_length())

    plain = batch_of(model, [f"{SHARED}no more?"], [FIRST])
    want = model.generate(**plain, **GREEDY)
    text = {key: plain[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, **GREEDY, past_key_values=copy.deepcopy(cache)), want)
    new = text | {"input_ids": text["input_ids"][:, shared:]}
    logits = model(**new, past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(logits, model(**plain).logits[:, shared:])

    shorter = batch_of(model, [f"{SHARED}so {AUDIO_TOKEN}?"], [FIRST, tone(700, 0.04)])
    got = model.generate(**shorter, **GREEDY, past_key_values=copy.deepcopy(cache))
    assert torch.equal(got, model.generate(**shorter, **GREEDY))

    cache.crop(len("first ") - cache.get_seq_length())
    silent = dict(processor_of(model)(["first of all"]))
    assert torch.equal(model.generate(**silent, **GREEDY, past_key_values=cache), model.generate(**silent, **GREEDY))
