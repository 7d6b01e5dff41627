"""What a decoding step of an audio LLM costs besides attention: what its language model costs alone, or hardly more."""

import functools

import pytest
from support.audio_llm import MIXED, batch_of_two, build_pal, text_config
from support.counting import count_reads
from support.decoding import (
    CACHES,
    HOST,
    LAYERS,
    MOST,
    ONE_OPERATOR,
    REPEATED,
    one_operator,
    per_layer_and_step,
    per_step,
)
from support.thorough import combinations
from transformers import AutoModelForCausalLM

from palkernels.model.causal_lm import attention

NAMES = ("lal", "plits", "plits+lal", "lal+lal")


@pytest.fixture(autouse=True)
def attention_is_one_operator(monkeypatch):
    monkeypatch.setattr(attention, "lal_attention", one_operator)


def with_audio(name, cache):
    """From a number of layers to a function that generates with an audio LLM."""

    def model_of(layers):
        model = build_pal(*MIXED[name], text={"num_hidden_layers": layers})
        if name == "plits":  # its language model is a stock one
            model.language_model.set_attn_implementation(ONE_OPERATOR)
        batch = batch_of_two(model) | CACHES[cache]
        return lambda tokens: model.generate(**batch, max_new_tokens=tokens, do_sample=False, eos_token_id=None)

    return model_of


def of_text(cache, implementation=ONE_OPERATOR):
    """The same with a language model alone, and the texts of the batch."""

    def model_of(layers):
        model = AutoModelForCausalLM.from_config(text_config(num_hidden_layers=layers)).eval()
        model.set_attn_implementation(implementation)
        found = batch_of_two(build_pal(*MIXED["lal"]))
        batch = {name: found[name] for name in ("input_ids", "attention_mask")} | CACHES[cache]
        return lambda tokens: model.generate(**batch, max_new_tokens=tokens, do_sample=False, eos_token_id=None)

    return model_of


@functools.cache
def of_stock(cache, counted):
    implementation = ONE_OPERATOR if counted == "operators" else "sdpa"
    return per_layer_and_step(of_text(cache, implementation), HOST[counted])


@pytest.mark.parametrize(("name", "cache", "counted"), combinations(NAMES, CACHES, HOST))
def test_a_layer_asks_no_more_of_the_host(name, cache, counted):
    """As many operators as a layer of the language model alone, and at most 1.3 times its calls."""
    stock, ours = of_stock(cache, counted), per_layer_and_step(with_audio(name, cache), HOST[counted])
    assert min(stock.values()) > 0
    if counted == "operators":
        assert ours == stock
    else:
        for what, calls in stock.items():
            assert ours[what] + REPEATED[what] * (name != "plits") <= MOST * calls, what


@pytest.mark.parametrize("name", NAMES)
def test_a_step_asks_hardly_more_of_the_host(name):
    """With what is made once for all its layers."""
    text, ours = (
        per_step(model_of(LAYERS[1]), HOST["calls"])["Python calls"]
        for model_of in (of_text("dynamic", "sdpa"), with_audio(name, "dynamic"))
    )
    assert 0 < ours <= MOST * text


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name, cache, monkeypatch):
    """But for what generate itself waits for, as whether all texts have ended: the text's model makes no masks here."""
    models = of_text(cache), with_audio(name, cache)
    text, ours = (per_step(model_of(2), lambda run: {"reads": count_reads(run, monkeypatch)}) for model_of in models)
    assert ours == text
