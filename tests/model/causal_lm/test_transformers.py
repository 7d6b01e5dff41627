"""What the model layer relies on in transformers. Each failure names the part that a release has moved."""

import inspect
import sys

import pytest
import torch
from support.oracles import FAMILIES, build
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from palkernels.model.causal_lm.caches import CACHE_KEYWORDS


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


def test_modeling_files_hold_rope_and_eager_attention(model):
    file = sys.modules[type(model.model.layers[0].self_attn).__module__]
    names = list(inspect.signature(file.apply_rotary_pos_emb).parameters)
    assert names[:4] == ["q", "k", "cos", "sin"], "apply_rotary_pos_emb"
    assert callable(file.eager_attention_forward), "eager_attention_forward"


def test_layers_are_called_as_the_self_check_calls_them(model):
    """Hidden states first, the rest by keyword; unknown keywords reach the attention function."""
    seen = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape, kwargs))
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("probe_of_this_test", probe)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((len(args), kwargs)), with_kwargs=True)
    model.config._attn_implementation = "probe_of_this_test"
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3, dtype=torch.long), our_keyword=model)
    calls, attention = seen[0::2], seen[1::2]
    assert len(seen) == 6, "one attention call per layer, by AttentionInterface"
    for count, keywords in calls:
        assert count == 1, "hidden states are the layer's only positional argument"
        assert {"attention_mask", "position_embeddings", "position_ids"} <= set(keywords), "keywords"
        assert len({*CACHE_KEYWORDS} & set(keywords)) == 1, "the cache's keyword"
        assert keywords["our_keyword"] is model, "unknown keywords reach the layers"
    for shape, keywords in attention:
        assert shape[2] == 3, "queries are (B, H, T, D)"
        assert keywords["our_keyword"] is model, "unknown keywords reach the attention function"
        assert "scaling" in keywords, "scaling"


def test_rotary_embedding_takes_states_and_positions(model):
    names = list(inspect.signature(model.model.rotary_emb.forward).parameters)
    assert names[:2] == ["x", "position_ids"], "rotary_emb"
    assert names[2:] in ([], ["layer_type"]), "rotary_emb's layer types"


def test_generate_prepares_every_forward(model, monkeypatch):
    """``prepare_inputs_for_generation`` is looked up on the instance, given the 2-D mask by keyword and the cache."""
    stock, calls = model.prepare_inputs_for_generation, []

    def prepare(*args, **kwargs):
        calls.append(kwargs)
        return stock(*args, **kwargs)

    object.__setattr__(model, "prepare_inputs_for_generation", prepare)
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    for implementation in ("dynamic", "static"):
        calls.clear()
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=implementation)
        assert [call["attention_mask"].shape for call in calls] == [(2, 3), (2, 4), (2, 5)], "one call a forward"


def test_caches_count_and_drop_keys():
    model = build("gemma3")
    key = torch.zeros(1, 2, 5, 16)
    dynamic, static = DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=9)
    assert [cache.is_compileable for cache in (dynamic, static)] == [False, True], "is_compileable"
    for cache, rooms in ((dynamic, (5, 5)), (static, (5, 9))):
        results = [cache.update(key, key, layer)[0].shape[2] for layer in range(3)]
        assert (results[0], results[1]) == rooms, "what update returns: a window's keys, all keys"
        assert int(cache.get_seq_length()) == 5, "get_seq_length"
        step = [cache.update(key[:, :, :1], key[:, :, :1], layer)[0].shape[2] for layer in range(3)]
        assert step[0] == 4, "a full window of 4 holds the last 4 keys"
        assert step[1] == (6 if cache is dynamic else 9), "other layers hold all"


def test_checkpointing_says_whether_it_is_reentrant():
    model = build("llama")
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        layer = model.model.layers[0]
        assert layer.gradient_checkpointing, "gradient_checkpointing"
        assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is reentrant, "_gradient_checkpointing_func"


def test_positions_that_jump_are_read_as_packed_sequences_without_a_mask():
    """Why a forward with audio always has a mask or a cache. If this fails, the mask of ones can go."""
    model = build("llama")
    ids, jump = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0, 1, 8, 9]])
    with torch.no_grad():
        packed = model(ids, position_ids=jump, use_cache=False).logits
        whole = model(ids, position_ids=jump, use_cache=False, attention_mask=torch.ones_like(ids)).logits
    assert not torch.allclose(packed, whole)


def test_attention_functions_are_looked_up_by_name():
    assert callable(ALL_ATTENTION_FUNCTIONS.get_interface), "get_interface"
    assert ALL_ATTENTION_FUNCTIONS.get_interface("palkernels_lal", None) is not None
