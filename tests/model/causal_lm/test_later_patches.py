"""What others do to an attached model afterwards: it computes what it did before, or says what must come first."""

import functools
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support.attached import audio_state, batch, texts
from support.oracles import build

from palkernels.model import attach

KEPT = {}  # where a wrapper may keep what it wraps


def bound(model):
    model.forward = types.MethodType(type(model).forward, model)


def partial_of_the_class(model):
    model.forward = functools.partial(type(model).forward, model)


def partial_of_ours(model):
    model.forward = functools.partial(model.forward, use_cache=False)


def in_a_closure(model):
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)


def out_of_sight(model):
    KEPT["forward"] = model.forward
    model.forward = lambda *args, **kwargs: KEPT["forward"](*args, **kwargs)


def generate_of_the_class(model):
    model.generate = types.MethodType(type(model).generate, model)


def accelerate(model):
    for module in (model, *model.model.layers):
        add_hook_to_module(module, ModelHook())


def layers_bound(model):
    for layer in model.model.layers:
        layer.forward = types.MethodType(type(layer).forward, layer)


def compiled(model):
    return torch.compile(model, backend="eager")


HARMLESS = (
    bound, partial_of_the_class, partial_of_ours, in_a_closure, out_of_sight, generate_of_the_class, accelerate,
    layers_bound, compiled, torch.nn.DataParallel,
)  # fmt: skip


def results(model, wrapped, keywords):
    options = {"max_new_tokens": 3, "do_sample": False}
    outputs = [wrapped(**keywords, labels=keywords["input_ids"], audio=state) for state in (STATE, None, STATE)]
    tokens = [model.generate(**keywords, **options, audio=STATE), model.generate(**keywords, **options)]
    return [*(output.loss for output in outputs), *tokens]


STATE = audio_state("inserted", torch.float32)


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
@torch.no_grad()
def test_results_stay(change):
    """Also without audio, and of the stock model after detach."""
    _, padded, mask = batch(texts(), "left")
    keywords = {"input_ids": padded, "attention_mask": mask}
    model = build("llama", layers=2)
    stock = model(**keywords).logits
    handle = attach(model)
    want = results(model, model, keywords)
    changed = change(model)
    wrapped = model if changed is None else changed
    for got, expected in zip(results(model, wrapped, keywords), want, strict=True):
        assert torch.equal(got, expected)
    handle.detach()
    assert torch.equal(wrapped(**keywords).logits, stock)


@pytest.mark.parametrize("first", ["liger", "attach"])
def test_liger_with_its_fused_loss(first, monkeypatch):
    """The Trainer applies it after attach; only its loss runs in Triton's interpreter."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _, ids, _ = batch(texts(), "none")
    model = build("llama").train()
    handle = attach(model)
    want = model(input_ids=ids, labels=ids, audio=STATE).loss
    without = model(input_ids=ids, labels=ids).loss
    if first == "liger":
        handle.detach()
    kernels = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
    _apply_liger_kernel_to_instance(model=model, **kernels, fused_linear_cross_entropy=True)
    if first == "liger":
        attach(model)
    for _ in range(2):
        outputs = model(input_ids=ids, labels=ids, audio=STATE)
        assert outputs.logits is None  # it is the fused loss
        torch.testing.assert_close(outputs.loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, without, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_replaced_forward_is_given_is_checked_too():
    """The first call after it was replaced, too: a layer that takes no audio, and one that raises."""
    _, padded, _ = batch(texts(), "none")
    for message in ("layers \\[1\\] did not", "its own"):
        model = build("llama")
        attach(model)
        attention = model.model.layers[1].self_attn
        config = attention.config
        stock = type(model).forward
        if message == "its own":
            model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("its own"))
        else:
            attention.config = config._palkernels_stock_config
            bound(model)
        with pytest.raises(RuntimeError, match=message):
            model(padded, audio=STATE)
        attention.config = config
        model.forward = types.MethodType(stock, model)
        fresh = build("llama")
        attach(fresh)
        assert torch.equal(model(padded, audio=STATE).logits, fresh(padded, audio=STATE).logits)


def test_a_forward_of_the_class_is_the_stock_one_at_once(monkeypatch):
    model = build("llama")
    attach(model)
    _, padded, _ = batch(texts(), "none")
    want, calls = model(padded, audio=STATE).logits, []
    stock = type(model).forward

    @functools.wraps(stock)
    def counted(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    assert torch.equal(model(padded, audio=STATE).logits, want)
    assert calls == [1]


def scaled(attention, monkeypatch):
    stock = attention.forward
    attention.forward = lambda hidden_states, **kwargs: stock(1.1 * hidden_states, **kwargs)


def bypassed(attention, monkeypatch):
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)


def scaled_in_the_class(attention, monkeypatch):
    stock = type(attention).forward

    @functools.wraps(stock)
    def forward(self, hidden_states, **kwargs):
        return stock(self, 1.1 * hidden_states if self.layer_idx == 1 else hidden_states, **kwargs)

    monkeypatch.setattr(type(attention), "forward", forward)


@pytest.mark.parametrize("change", [scaled, bypassed, scaled_in_the_class])
@torch.no_grad()
def test_a_layer_that_computes_something_else_is_refused(change, monkeypatch):
    model = build("llama")
    attach(model)
    _, padded, _ = batch(texts(), "none")
    model(padded, audio=STATE)
    change(model.model.layers[1].self_attn, monkeypatch)
    for call in (model, lambda *args, **kwargs: model.generate(*args, **kwargs, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"layer 1 must compute what it did .* first, then attach again \(attach"):
            call(padded, audio=STATE)
    model(padded)


def test_a_replica_is_refused():
    """DataParallel copies a model's attributes, and with them what runs the first one."""
    model = build("llama")
    attach(model)
    _, padded, _ = batch(texts(), "none")
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="an attached model must run itself, got a replica of LlamaForCausalLM"):
        replica(padded)


def test_a_forward_of_the_class_by_hand_names_the_remedy():
    model = build("llama")
    attach(model)
    _, padded, _ = batch(texts(), "none")
    with pytest.raises(ValueError, match="that library first, Liger for instance, then attach again"):
        type(model).forward(model, padded, audio=STATE)
