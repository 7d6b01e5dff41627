"""Every way for audio to enter, by every way of decoding: the tokens of whole forwards, one for each token."""

import copy
import functools

import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, TEXTS, batch_of, build_pal, entry, open_gates, three_clips, tone
from support.releases import IS_NEWEST
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from palkernels.model import attach
from palkernels.model.causal_lm.caches import cache_of

ENTRIES = {
    "lal": ([entry("whisper")], {}),
    "plits": ([entry("whisper", "plits")], {}),
    "unified": ([entry("whisper")], {"summary_tokens": 3}),
    "plits+lal": ([entry("whisper", "plits"), entry("sslam")], {"projection": "per_layer", "layers": [1, 2]}),
    "plits+flamingo": ([entry("whisper", "plits"), entry("sslam", "flamingo")], {"flamingo": {"every": 2}}),
}
STEPS = 5
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
PROMPT, CLIPS = [f"hear {AUDIO_TOKEN}: what, and {AUDIO_TOKEN}? then"], [tone(), tone(300, 0.04)]


@functools.cache
def model_of(name, family="llama"):
    entries, settings = ENTRIES[name]
    return open_gates(build_pal(*entries, family=family, dtype=torch.float64, **settings))


@functools.cache
def case(name, batched):
    """A model, its batch, and the tokens to come: of three texts with padding, or of one."""
    model = model_of(name)
    batch = batch_of(model, TEXTS, three_clips()) if batched else batch_of(model, PROMPT, CLIPS)
    return model, batch, uncached(model, batch)


@torch.no_grad()
def uncached(model, batch, steps=STEPS):
    """The tokens of greedy decoding by whole forwards."""
    grown = dict(batch)
    for _ in range(steps):
        new = model(**grown, use_cache=False).logits[:, -1:].argmax(-1)
        grown["input_ids"] = torch.cat([grown["input_ids"], new], dim=1)
        grown["attention_mask"] = torch.nn.functional.pad(grown["attention_mask"], (0, 1), value=1)
    return grown["input_ids"][:, -steps:]


def new_tokens(model, batch, **options):
    return model.generate(**batch, **GREEDY, **options)[:, -STEPS:]


BATCHED = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 5},
    "chunks into a static cache": {
        "prefill_chunk_size": 5, "cache_implementation": "static", "disable_compile": True,
    },
    "offloaded cache": {"cache_implementation": "dynamic"},
}  # fmt: skip


@pytest.mark.parametrize("way", BATCHED)
@pytest.mark.parametrize("name", ENTRIES)
def test_texts_of_a_padded_batch(name, way):
    model, batch, want = case(name, True)
    assert torch.equal(new_tokens(model, batch, **BATCHED[way]), want)


def stock_like(model):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(model.config.text_config).eval()


def attached_like(model):
    assistant = stock_like(model)
    attach(assistant)
    return assistant


def audio_llm(model, name):
    entries, settings = ENTRIES[name]
    other = build_pal(*entries, **settings)
    with torch.no_grad():
        for parameter in other.language_model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return other


DRAFTS = {
    "lookup": lambda model, name: {"prompt_lookup_num_tokens": 3},
    "stock assistant": lambda model, name: {"assistant_model": stock_like(model)},
    "attached assistant": lambda model, name: {"assistant_model": attached_like(model)},
    "its language model": lambda model, name: {"assistant_model": model.language_model},
    "audio LLM": lambda model, name: {"assistant_model": audio_llm(model, name)},
    "itself": lambda model, name: {"assistant_model": model},
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", ENTRIES)
def test_drafts(name, draft):
    model, batch, want = case(name, False)
    assert torch.equal(new_tokens(model, batch, **DRAFTS[draft](model, name)), want)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_assistant_that_is_an_audio_llm_hears_the_clips(name):
    """The drafts of a copy are then all right: the model runs twice, for STEPS - 1 drafts and for the token behind."""
    model, batch, want = case(name, False)
    assistant = copy.deepcopy(model)
    assistant.generation_config.update(num_assistant_tokens=STEPS - 1, num_assistant_tokens_schedule="constant")
    assistant.generation_config.assistant_confidence_threshold = 0
    runs = []
    hook = model.language_model.register_forward_pre_hook(lambda module, args: runs.append(module))
    got = new_tokens(model, batch, assistant_model=assistant)
    hook.remove()
    assert torch.equal(got, want)
    assert len(runs) == 1


@pytest.mark.parametrize("name", ENTRIES)
def test_beams(name):
    """With and without a cache, of one prompt and of texts of different lengths; as many sequences as are asked for."""
    model, batch, _ = case(name, True)
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    got = model.generate(**batch, **options)
    assert got.shape[0] == 2 * len(TEXTS)
    for more in ({"use_cache": False}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(**batch, **options, **more), got)


@pytest.mark.parametrize("name", ENTRIES)
def test_samples(name):
    """Sampled tokens are those that whole forwards and the same random numbers give."""
    model, batch, _ = case(name, True)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "eos_token_id": None, "num_return_sequences": 2}
    found = []
    for more in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        found.append(model.generate(**batch, **options, **more))
    assert found[0].shape[0] == 2 * len(TEXTS)
    assert torch.equal(*found)


class Stream:
    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.tokens.append("end")


@pytest.mark.parametrize("name", ENTRIES)
def test_streaming(name):
    model, batch, want = case(name, False)
    stream = Stream()
    new_tokens(model, batch, streamer=stream)
    assert stream.tokens == [*batch["input_ids"][0].tolist(), *want[0].tolist(), "end"]


@torch.no_grad()
def by_hand(model, input_ids, generation_config, **settings):
    """A decoding method of a user's own: every step runs two copies of each text, of which the second is kept."""
    settings.pop("logits_processor"), settings.pop("stopping_criteria")
    for step in range(STEPS):
        if step:
            cache_of(settings).batch_repeat_interleave(2)
        grown = {name: x.repeat_interleave(2, 0) if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
        inputs = model.prepare_inputs_for_generation(
            input_ids.repeat_interleave(2, 0), next_sequence_length=1 if step else None, is_first_iteration=not step,
            **grown,
        )  # fmt: skip
        outputs = model(**inputs, return_dict=True)
        settings = model._update_model_kwargs_for_generation(outputs, settings)
        cache_of(settings).batch_select_indices(torch.arange(1, 2 * len(input_ids), 2))
        input_ids = torch.cat([input_ids, outputs.logits[1::2, -1:].argmax(-1)], dim=1)
    return input_ids


@pytest.mark.parametrize("name", ENTRIES)
def test_a_decoding_method_of_the_callers_own(name):
    """As contrastive search does, it runs several rows for each text and then keeps some."""
    model, batch, want = case(name, True)
    assert torch.equal(new_tokens(model, batch, custom_generate=by_hand), want)


@pytest.mark.parametrize("name", ENTRIES)
def test_embeddings(name):
    """Embeddings are the prompt, beside their ids and without; placeholders are known by their embedding."""
    model, batch, want = case(name, True)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    assert torch.equal(new_tokens(model, batch, inputs_embeds=embeds), want)
    alone = {name: x for name, x in batch.items() if name != "input_ids"}
    assert torch.equal(new_tokens(model, alone, inputs_embeds=embeds), want)
    with torch.no_grad():
        logits = model(**alone, inputs_embeds=embeds).logits
        torch.testing.assert_close(logits, model(**batch).logits)
    if model.config.uses("plits"):  # they may hold the audio already, but nobody can know
        with pytest.raises(
            ValueError, match=r"inputs_embeds must hold the embedding of a placeholder, token 2, .*got \["
        ):
            model.generate(**alone, inputs_embeds=torch.randn_like(embeds), max_new_tokens=1)


@pytest.mark.parametrize("name", ENTRIES)
def test_audio_features(name, monkeypatch):
    """Clips that are encoded already, and clips that are encoded once."""
    model, batch, want = case(name, True)
    batch = dict(batch)
    features = model.get_audio_features(batch.pop("input_features"), batch.pop("audio_lengths"))
    monkeypatch.setattr(model.audio_tower[0], "forward", None)
    assert torch.equal(new_tokens(model, batch, audio_features=features), want)


@pytest.mark.parametrize("name", ENTRIES)
def test_guidance(name):
    """The forwards of guidance see the text only, with a cache and without."""
    model, batch, _ = case(name, False)
    options = {"guidance_scale": 1.5}
    want = new_tokens(model, batch, **options, use_cache=False)
    assert torch.equal(new_tokens(model, batch, **options), want)


@pytest.mark.parametrize("name", ENTRIES)
def test_rope_that_changes_with_the_length(name):
    """Phi-3 runs the whole text again once it is longer than its short frequencies reach."""
    entries, settings = ENTRIES[name]
    factors = [1.0 + 0.1 * i for i in range(8)]
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": factors, "rope_theta": 10_000.0}
    text = {"original_max_position_embeddings": 35, "max_position_embeddings": 100, "rope_parameters": rope}
    model = open_gates(build_pal(*entries, family="phi3", dtype=torch.float64, text=text, **settings))
    batch = batch_of(model, PROMPT, CLIPS)
    got = model.generate(**batch, **GREEDY | {"max_new_tokens": 12})[:, -12:]
    assert torch.equal(got, uncached(model, batch, 12))


def conversation(name):
    """A model, a first question with its clip, its answer, and the batch of the whole conversation after a second."""
    model = model_of(name)
    first, second = tone(), tone(300, 0.06)
    start = batch_of(model, [f"one {AUDIO_TOKEN}?"], [first])
    more = batch_of(model, [f"one {AUDIO_TOKEN}?{AUDIO_TOKEN} two?"], [first, second])
    plain = batch_of(model, [f"one {AUDIO_TOKEN}? and?"], [first])
    return model, start, more, plain


def grown(batch, prompt, answer):
    """A batch with the answer's tokens, as they are, between the first question and the second."""
    ids = torch.cat([batch["input_ids"][:, :prompt], answer, batch["input_ids"][:, prompt:]], dim=1)
    insert_at = batch["insert_at"].clone()
    insert_at[:, 1:] += answer.shape[1]
    return batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "insert_at": insert_at}


def new_cache(model, kind):
    config = model.config.text_config
    return StaticCache(config=config, max_cache_len=80) if kind == "static" else DynamicCache(config=config)


def text_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ENTRIES)
def test_a_conversation_goes_on(name, kind):
    """With a second clip or without, by the whole conversation's ids or by its new ones, and in a copy of the cache."""
    model, start, more, plain = conversation(name)
    cache = new_cache(model, kind)
    begun = model.generate(**start, **GREEDY | {"max_new_tokens": 3}, past_key_values=cache)
    prompt = start["input_ids"].shape[1]
    answer, cached = begun[:, prompt:], int(cache.get_seq_length())
    for batch in (grown(more, prompt, answer), grown(plain, prompt, answer)):
        want = uncached(model, batch)
        new_ids = batch | {"input_ids": batch["input_ids"][:, cached:]}
        for turn in (batch, new_ids):
            assert torch.equal(new_tokens(model, turn, past_key_values=copy.deepcopy(cache)), want)
    for turn in (batch, new_ids):  # of the second question, which has no clip
        assert torch.equal(new_tokens(model, text_of(turn), past_key_values=copy.deepcopy(cache)), want)
    if kind == "dynamic":
        for more in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": stock_like(model)}):
            assert torch.equal(new_tokens(model, batch, past_key_values=copy.deepcopy(cache), **more), want)
            assert torch.equal(new_tokens(model, text_of(batch), past_key_values=copy.deepcopy(cache), **more), want)
            with pytest.raises(ValueError, match=f"input_ids must be the whole conversation where {next(iter(more))}"):
                model.generate(**new_ids, past_key_values=copy.deepcopy(cache), **more)
    with torch.no_grad():
        step = model(**text_of(new_ids), past_key_values=copy.deepcopy(cache)).logits
    whole = model(**batch).logits[:, cached:]
    torch.testing.assert_close(step, whole)


@pytest.mark.parametrize("name", ENTRIES)
def test_rows_of_a_cache_keep_their_audio(name):
    """Rows that are repeated, chosen and put in another order: each goes on with what it has heard."""
    model, batch, _ = case(name, True)
    options = {"do_sample": True, "max_new_tokens": STEPS, "eos_token_id": None, "num_return_sequences": 2}
    torch.manual_seed(0)
    begun = model.generate(**batch, **options, return_dict_in_generate=True)
    cache = begun.past_key_values
    rows = torch.tensor([5, 0, 2])
    cache.batch_select_indices(rows)
    ids = begun.sequences[rows][:, : cache.get_seq_length() + 1]
    mask = torch.cat([batch["attention_mask"].repeat_interleave(2, 0)[rows], torch.ones(3, STEPS)], dim=1)
    turn = {"input_ids": ids, "attention_mask": mask[:, : ids.shape[1]].long()}
    texts = rows // 2
    again = batch | turn | {name: batch[name][texts] for name in ("audio_index", "insert_at")}
    want = uncached(model, again)
    assert torch.equal(new_tokens(model, turn, past_key_values=copy.deepcopy(cache)), want)
    cache.batch_repeat_interleave(2)
    twice = {name: x.repeat_interleave(2, 0) for name, x in turn.items()}
    assert torch.equal(new_tokens(model, twice, past_key_values=copy.deepcopy(cache)), want.repeat_interleave(2, 0))
    cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
    turned = {name: x.flip(0) for name, x in twice.items()}
    assert torch.equal(
        new_tokens(model, turned, past_key_values=copy.deepcopy(cache)), want.repeat_interleave(2, 0).flip(0)
    )
    if model.config.uses("lal") or model.config.uses("flamingo"):
        with pytest.raises(
            ValueError, match="audio must be given again: the cache has heard it for 6 text rows, got 4"
        ):
            model.generate(ids[[0, 1, 2, 0]], past_key_values=cache)
    cache.reset()
    if IS_NEWEST or cache.get_seq_length() == 0:  # transformers 5.17 keeps the length
        assert torch.equal(new_tokens(model, batch, past_key_values=cache), case(name, True)[2])
