"""What transformers asks of its own audio models: signatures, outputs, warnings, graphs."""

import copy
import inspect
import warnings

import pytest
import torch
from support.audio_llm import (
    AUDIO_ID,
    INTEGRATIONS,
    TEXTS,
    TOKENIZER,
    batch_of,
    build_pal,
    entry,
    open_gates,
    text_config,
    three_clips,
)
from support.compiled import in_whole_graphs
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from palkernels.model import AudioFeatures, PalForConditionalGeneration
from palkernels.model.causal_lm.memory import memory_of


def model_of(name, **more):
    entries, settings = INTEGRATIONS[name]
    return open_gates(build_pal(*entries, **settings, **more))


def test_encoded_clips_are_an_output_of_transformers():
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    batch = batch_of(model)
    clips = {name: batch.pop(name) for name in ("input_features", "audio_lengths")}
    with torch.no_grad():
        features = model.get_audio_features(**clips, return_dict=True, output_hidden_states=True)
        assert isinstance(features, AudioFeatures)
        assert isinstance(features, BaseModelOutputWithPooling)
        assert torch.equal(features.last_hidden_state, model.audio_tower[0](clips["input_features"][0]))
        assert [x.shape[-1] for x in features.hidden_states] == [16, 16]
        assert features.pooler_output.shape[-1] == model.config.text_config.hidden_size
        assert torch.equal(features.pooler_output[:, : features.plits.states.shape[1]], features.plits.states)
        assert isinstance(model.get_audio_features(**clips, return_dict=False), tuple)
        want = model(**batch, **clips).logits
        for again in (features, copy.deepcopy(features), AudioFeatures(plits=features.plits, lal=features.lal)):
            assert torch.equal(model(**batch, audio_features=again).logits, want)
    with pytest.raises(TypeError, match="audio_features must be what get_audio_features returns, got tuple"):
        model(**batch, audio_features=features.to_tuple())


def test_signatures():
    parameters = inspect.signature(PalForConditionalGeneration.forward).parameters
    assert {"logits_to_keep", "use_cache", "past_key_values", "labels"} <= set(parameters)
    assert PalForConditionalGeneration._can_compile_fullgraph
    assert "inputs_embeds" in inspect.signature(PalForConditionalGeneration.prepare_inputs_for_generation).parameters


@pytest.mark.parametrize("name", INTEGRATIONS)
@torch.no_grad()
def test_settings_of_a_forward(name):
    model = model_of(name)
    batch = batch_of(model)
    whole = model(**batch)
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, whole.logits[:, -2:])
    assert model(**batch, use_cache=False).past_key_values is None
    assert torch.equal(model(**batch, return_dict=False)[0], whole.logits)
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 4


@pytest.mark.parametrize("name", INTEGRATIONS)
@torch.no_grad()
def test_generate_without_a_prompt(name):
    """It begins with the BOS token, as in transformers, or says what is missing; audio needs a prompt."""
    model = model_of(name)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    assert model.generate(**options, bos_token_id=5).shape == (1, 3)
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(**options)
    features = batch_of(model)["input_features"]
    with pytest.raises(ValueError, match="generate must be given a prompt with audio"):
        model.generate(input_features=features, **options, bos_token_id=5)


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_what_describes_clips_comes_with_them(run):
    model = model_of("plits+lal")
    batch = batch_of(model, ["text alone"], [])
    call = model if run == "forward" else model.generate
    for name in ("audio_lengths", "audio_index", "insert_at"):
        with pytest.raises(
            ValueError, match=f"{name} must come with clips, input_features, encoder_states or audio_features, got none"
        ):
            call(**batch, **{name: torch.zeros(1, 1, dtype=torch.long)})
    heard = batch_of(model)
    features = model.get_audio_features(heard.pop("input_features"), heard["audio_lengths"])
    with pytest.raises(
        ValueError, match="audio_lengths must come with input_features or encoder_states, got audio_features"
    ):
        call(**heard, audio_features=features)


@pytest.mark.parametrize("name", ["audios", "audio", "input_values"])
def test_a_keyword_that_nobody_knows_is_refused(name):
    """The language model would pass over it, and the answer would be that of the text alone."""
    model = model_of("lal")
    batch = batch_of(model, ["text alone"], [])
    with pytest.raises(TypeError, match=rf"keywords that it or the language model knows, got \['{name}'\]"):
        model(**batch, **{name: torch.zeros(1)})
    with pytest.raises((TypeError, ValueError), match=name):
        model.generate(**batch, **{name: torch.zeros(1)})


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_a_mark_without_a_clip(run):
    """A text that marks a clip and is given none: by LAL a warning, by PLITS an error; once for a generate call."""
    text = {"input_ids": torch.tensor([[9, AUDIO_ID, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}

    def call(model, batch):
        return model(**batch) if run == "forward" else model.generate(**batch, max_new_tokens=3, do_sample=False)

    with pytest.warns(UserWarning, match="input_ids marks a clip by token 2, but no audio is given") as found:
        call(model_of("lal"), text)
    assert len([warning for warning in found if "marks a clip" in str(warning.message)]) == 1
    with pytest.raises(ValueError, match="audio must be given for 1 placeholders in input_ids, got none"):
        call(model_of("plits"), text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(model_of("lal"), text | {"input_ids": torch.tensor([[9, 7, 8]])})
        call(model_of("lal", audio_token_id=None), text)


def test_options_that_cannot_be_served_are_named():
    model = model_of("plits+lal")
    batch = batch_of(model, TEXTS[:1], three_clips()[:1])
    for name, value in {
        "assistant_early_exit": 1, "use_mtp": True, "token_healing": True, "cache_implementation": "paged",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must not be"):
            model.generate(**batch, **{name: value}, max_new_tokens=1)
    with pytest.raises(ValueError, match="generate_batch must not be called on an audio LLM"):
        model.generate_batch([[5, 6]])
    features = model.get_audio_features(batch.pop("input_features"), batch.pop("audio_lengths"))
    with pytest.raises(ValueError, match="input_features must be given for an assistant_model that is an audio LLM"):
        model.generate(**batch, audio_features=features, assistant_model=model_of("plits+lal"), max_new_tokens=1)


def test_an_assistant_that_cannot_hear_is_named():
    model, assistant = model_of("plits"), build_pal(entry("whisper", "plits"))
    batch = batch_of(model, TEXTS[:1], three_clips()[:1])
    with pytest.raises(ValueError, match="assistant_model must be able to hear the prompt's audio, but"):
        model.generate(**batch, assistant_model=assistant, max_new_tokens=2)


def test_an_audio_token_that_the_embeddings_lack():
    """As where a tokenizer has been given one: the error says how they get it, and then it works."""
    llm = AutoModelForCausalLM.from_config(text_config(vocab_size=AUDIO_ID))
    with pytest.raises(ValueError, match=r"audio_token_id must be from 0 to 1, got 2: language_model.resize_token_emb"):
        PalForConditionalGeneration.from_parts(llm, [entry("whisper", "plits")], audio_token_id=AUDIO_ID)
    llm.resize_token_embeddings(len(TOKENIZER))
    model = PalForConditionalGeneration.from_parts(llm, [entry("whisper", "plits")], audio_token_id=AUDIO_ID)
    assert model(**batch_of(model)).logits.shape[-1] == len(TOKENIZER)


@pytest.mark.parametrize("name", INTEGRATIONS)
@torch.no_grad()
def test_a_forward_by_hand_remembers(name):
    """A prompt in pieces, with its clips in each or in the first alone: the logits of one forward."""
    model = model_of(name, dtype=torch.float64)
    batch = batch_of(model)
    whole, ids, mask = model(**batch).logits, batch["input_ids"], batch["attention_mask"]
    valid = mask != 0
    text = ("input_ids", "attention_mask")
    clips = {name: x for name, x in batch.items() if name not in text}
    for again in (clips, {}):
        for cache in (DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, 64)):
            parts = []
            for start in range(0, ids.shape[1], 7):
                new = {"input_ids": ids[:, start : start + 7], "attention_mask": mask[:, : start + 7]}
                heard = clips if start == 0 else again
                parts.append(model(**new, **heard, past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(parts, dim=1)[valid], whole[valid])
            cache.reset()
            assert model(ids[:, -3:] * 0 + 9, past_key_values=cache).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plits+lal", "flamingo"])
@torch.no_grad()
def test_whole_graphs(name):
    """A forward on encoded clips, and the steps of generation with a static cache, each as one graph."""
    model = model_of(name)
    batch = batch_of(model)
    options = {"max_new_tokens": 22, "do_sample": False, "eos_token_id": None}
    tokens, want = model.generate(**batch, **options), model(**batch).logits
    graphs, static = in_whole_graphs()
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **options, **static), tokens)
        assert len(graphs) == 1
    batch["audio_features"] = model.get_audio_features(batch.pop("input_features"), batch.pop("audio_lengths"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    valid = batch["attention_mask"] != 0
    got = compiled(**batch, use_cache=True)
    torch.testing.assert_close(got.logits[valid], want[valid], rtol=1e-4, atol=1e-4)
    assert memory_of(got.past_key_values) is not None


@pytest.mark.parametrize("run", ["forward", "generate"])
def test_no_clips_and_no_texts_are_named(run):
    model = model_of("plits+lal")
    batch = batch_of(model)
    call = model if run == "forward" else model.generate
    none = [features[:0] for features in batch["input_features"]]
    with pytest.raises(ValueError, match="input_features must hold at least one clip, got none: leave them"):
        call(**batch | {"input_features": none, "audio_lengths": batch["audio_lengths"][:0]})
    of_texts = ("input_ids", "attention_mask", "audio_index", "insert_at")
    with pytest.raises(ValueError, match="input_ids must hold at least one text with audio, got none"):
        call(**batch | {name: batch[name][:0] for name in of_texts})
