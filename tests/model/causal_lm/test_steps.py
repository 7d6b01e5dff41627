"""A transformers that moves what decoding relies on is refused at attach or in the first step, not answered wrongly."""

import pytest
import torch
from support.attached import attached
from support.oracles import FAMILIES, SIZES, build
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from palkernels.model import AudioState, attach, attach_flamingo
from palkernels.model.causal_lm import caches
from palkernels.model.causal_lm.caches import CACHE_KEYWORDS, cache_keyword, cache_of

KEYWORD = cache_keyword(LlamaForCausalLM.forward)
NAMES = " or ".join(CACHE_KEYWORDS)


def renamed(arguments, old, new):
    return {new if name == old else name: argument for name, argument in arguments.items()}


class CacheRenamed(LlamaForCausalLM):
    """What transformers 5.24 did to the cache, once more: another name in ``forward`` and in every step."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, kept=None, inputs_embeds=None, **kwargs):
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return super().forward(**texts, position_ids=position_ids, **{KEYWORD: kept}, **kwargs)

    def prepare_inputs_for_generation(self, *args, kept=None, **kwargs):
        prepared = super().prepare_inputs_for_generation(*args, **{KEYWORD: kept}, **kwargs)
        return renamed(prepared, KEYWORD, "kept")


class MaskRenamed(LlamaForCausalLM):
    def forward(self, input_ids=None, mask=None, position_ids=None, cache=None, inputs_embeds=None, **kwargs):
        texts = {"input_ids": input_ids, "attention_mask": mask, "inputs_embeds": inputs_embeds}
        return super().forward(**texts, position_ids=position_ids, **{KEYWORD: cache}, **kwargs)


class Prepared(LlamaForCausalLM):
    """A model whose steps are prepared in another way than now."""

    def prepare_inputs_for_generation(self, input_ids, cache=None, past_key_values=None, **kwargs):
        cache = past_key_values if cache is None else cache
        return self.changed(super().prepare_inputs_for_generation(input_ids, **{KEYWORD: cache}, **kwargs), input_ids)


class CacheInParts(Prepared):
    def changed(self, prepared, input_ids):
        return renamed(prepared, KEYWORD, "cache_of_layers")


class WholeText(Prepared):
    def changed(self, prepared, input_ids):
        return prepared | {"input_ids": input_ids}


class MaskOfTheStep(Prepared):
    def changed(self, prepared, input_ids):
        return prepared | {"attention_mask": prepared["attention_mask"][:, -1:]}


class NoPositions(Prepared):
    def changed(self, prepared, input_ids):
        return {name: argument for name, argument in prepared.items() if name != "position_ids"}


MOVED = {
    CacheRenamed: rf"its forward takes no {NAMES} \(transformers 5",
    MaskRenamed: "its forward takes no attention_mask",
    CacheInParts: f"a step of its generate does not keep its cache as {NAMES}, but in ",
    WholeText: "a step of its generate cannot be read: attention_mask must be 2-D",
    MaskOfTheStep: "a step of its generate cannot be read: attention_mask must be 2-D",
    NoPositions: "a step of its generate has no position_ids",
}


@pytest.mark.parametrize("attach_it", [attach, attach_flamingo])
@pytest.mark.parametrize("moved", MOVED, ids=lambda moved: moved.__name__)
def test_a_moved_step_is_refused_at_attach(moved, attach_it):
    model = moved(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=f"attach must be given a causal LM .* got {moved.__name__}: {MOVED[moved]}"):
        attach_it(model)
    assert not {"forward", "generate"} & set(model.__dict__)


class Forgetful(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **{name: x for name, x in kwargs.items() if name not in CACHE_KEYWORDS})


def test_a_layer_that_loses_its_cache_is_refused():
    model = build("llama")
    model.model.layers[1].self_attn.__class__ = Forgetful
    with pytest.raises(
        ValueError, match="got LlamaForCausalLM: a layer puts its keys and values into its cache 0 times"
    ):
        attach(model)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@torch.no_grad()
def test_a_cache_that_is_not_found_is_refused_in_generate(implementation, monkeypatch):
    """The layers' keys tell, or the mask where generate makes one: had attach seen nothing, tokens would be wrong."""
    model = build("llama")
    attach(model)
    ids, audio = torch.randint(3, 101, (1, 7)), AudioState(torch.randn(1, 6, 64))
    monkeypatch.setattr(caches, "CACHE_KEYWORDS", ("elsewhere",))
    message = (
        r"the cache is not where it is looked for in this version of transformers|\(B, past \+ T\) = \(1, 1\), got"
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        model.generate(ids, audio=audio, max_new_tokens=3, do_sample=False, cache_implementation=implementation)


@torch.no_grad()
def test_a_cache_that_is_not_found_is_refused_in_forward(monkeypatch):
    model, keywords = attached("llama", "prefix")
    monkeypatch.setattr(caches, "CACHE_KEYWORDS", ("elsewhere",))
    cache = DynamicCache(config=model.config)
    del keywords["attention_mask"]
    model(**keywords, **{KEYWORD: cache})
    with pytest.raises(RuntimeError, match="the cache is not where it is looked for"):
        model(**keywords, **{KEYWORD: cache})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_tokens_are_those_of_whole_forwards(family):
    model = build(family)
    attach(model)
    ids, audio = torch.randint(3, 101, (1, 7)), AudioState(torch.randn(1, 6, 64) * 2)
    cached = model.generate(ids, audio=audio, max_new_tokens=5, do_sample=False)
    whole = ids
    for _ in range(5):
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), audio=audio, use_cache=False).logits
        whole = torch.cat([whole, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("keyword", sorted({"past_key_values", KEYWORD}))
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@torch.no_grad()
def test_every_name_that_transformers_takes_is_read(keyword):
    model = build("llama")
    attach(model)
    ids, audio = torch.randint(3, 101, (1, 7)), AudioState(torch.randn(1, 6, 64) * 2)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], audio=audio, **{keyword: cache})
    got = model(input_ids=ids[:, 4:], audio=audio, **{keyword: cache}).logits
    torch.testing.assert_close(got, model(input_ids=ids, audio=audio).logits[:, 4:])


def test_the_cache_among_arguments():
    cache, other = object(), object()
    assert cache_of({KEYWORD: cache}) is cache
    assert cache_of({"past_key_values": cache, "unknown": other}) is cache
    assert cache_of({KEYWORD: None}) is None
    assert cache_keyword(lambda **kwargs: None, lambda past_key_values: None) == "past_key_values"
    assert cache_keyword(lambda **kwargs: None) is None


@pytest.mark.skipif(len(CACHE_KEYWORDS) == 1, reason="this transformers knows one name")
def test_two_caches_are_refused():
    cache, other = object(), object()
    assert cache_of(dict.fromkeys(CACHE_KEYWORDS, cache)) is cache
    with pytest.raises(ValueError, match="must be given one cache, got cache and past_key_values"):
        cache_of(dict(zip(CACHE_KEYWORDS, (cache, other), strict=True)))
