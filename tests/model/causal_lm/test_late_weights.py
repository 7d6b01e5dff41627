"""Weights that are not there at attach: on the meta device, zeros, kept elsewhere by accelerate."""

import copy
import functools

import pytest
import torch
from support.attached import (
    TOKENS,
    WIDTH,
    audio_state,
    batch,
    texts,
    tiny,
)
from support.oracles import build
from support.thorough import EVERYTHING

from palkernels.model import AudioState, attach


def without_values(make):
    """A model whose weights are yet to come, and one that has them."""
    with torch.device("meta"):
        empty = make()
    return empty, make()


def load_into(empty, model):
    """As from_pretrained does it: weights by name, and what is in no checkpoint."""
    empty.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        setattr(empty.get_submodule(owner), own, buffer)
    empty.tie_weights()
    return empty.eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("hunyuan_v1_dense", head_dim=16), "got HunYuanDenseV1ForCausalLM: its keys differ"),
        (lambda: tiny("smollm3", no_rope_layers=[1, 0, 1]), "got SmolLM3ForCausalLM: its keys differ"),
        (lambda: tiny("gpt_oss"), "got GptOssForCausalLM: its attention takes s_aux"),
    ],
    ids=["norm after rope", "no rope", "sinks"],
)
def test_refused_once_there_are_weights(make, message):
    """On the meta device there is nothing to compare; the first call with audio does it, each time until it fits."""
    empty, model = without_values(make)
    attach(empty)
    load_into(empty, model)
    state = AudioState(torch.randn(1, TOKENS, WIDTH))
    for call in (empty, functools.partial(empty.generate, max_new_tokens=2)) * 2:
        with pytest.raises(ValueError, match=message):
            call(torch.tensor([[1, 2, 3]]), audio=state)
    empty(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_first_training_step_is_as_any(family):
    """A model of from_pretrained gives the gradients of one that was attached with its weights, bit by bit: else a run
    that goes on in another process would come to other weights."""
    empty, model = without_values(lambda: build(family, layers=2))
    for each in (empty, model):
        attach(each)
    load_into(empty, model)
    ids, state = batch(texts(), "none")[1], audio_state("inserted", torch.float32)
    for each in (empty, model):
        each.train()(ids, audio=state, labels=ids).loss.backward()
    gradients = dict(empty.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(gradients[name].grad, parameter.grad), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@torch.no_grad()
def test_weights_that_come_after_attach(family):
    """From the first forward with audio on as if they had been there, compiled too; compiling must wait for that.
    Of the families one is compiled; all with PALKERNELS_TESTS=all."""
    empty, model = without_values(lambda: build(family, layers=2))
    handle = attach(empty)
    assert "on the meta device" in str(handle.report())
    ids = batch(texts(), "none")[1]
    load_into(empty, model)
    assert "its weights had no values at attach" in str(handle.report())
    state = audio_state("inserted", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(empty, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="must run with audio before it is compiled"):
        compiled(ids, audio=state, use_cache=False)
    attach(model)
    want = model(ids, audio=state).logits
    with torch.autocast("cpu", torch.bfloat16):  # which the comparison must not see
        empty(ids, audio=state)
    assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}
    torch.testing.assert_close(empty(ids, audio=state).logits, want)
    if family == "llama" or EVERYTHING:
        torch.testing.assert_close(compiled(ids, audio=state, use_cache=False).logits, want)


def test_zeros_are_no_weights_yet():
    """A model that is allocated before it is loaded."""
    other = tiny("hunyuan_v1_dense", head_dim=16)
    values = copy.deepcopy(other.state_dict())
    for parameter in other.parameters():
        parameter.data.zero_()
    attach(other)
    other.load_state_dict(values)
    with pytest.raises(ValueError, match="got HunYuanDenseV1ForCausalLM: its keys differ"):
        other(torch.tensor([[1, 2, 3]]), audio=AudioState(torch.randn(1, TOKENS, WIDTH)))


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("offloaded", ["model", "layers"])
@torch.no_grad()
def test_offloaded_weights(attached, offloaded):
    """accelerate keeps weights elsewhere and brings them for each module's call."""
    from accelerate import cpu_offload

    model = build("llama")
    ids, state = batch(texts(), "none")[1], audio_state("inserted", torch.float32)
    handle = attach(model)
    want = model(ids, audio=state).logits
    tokens = model.generate(ids, audio=state, max_new_tokens=3, do_sample=False)
    if attached == "after":
        handle.detach()
    for part in [model] if offloaded == "model" else model.model.layers:
        cpu_offload(part, execution_device="cpu")
    assert model.model.layers[0].self_attn.k_proj.weight.is_meta
    handle = attach(model)
    for _ in range(2):
        torch.testing.assert_close(model(ids, audio=state).logits, want)
        assert torch.equal(model.generate(ids, audio=state, max_new_tokens=3, do_sample=False), tokens)
    assert {layer.audio_kv for layer in handle.report().layers} == {"modules"}
    other = tiny("hunyuan_v1_dense", head_dim=16)
    cpu_offload(other, execution_device="cpu")
    with pytest.raises(ValueError, match="got HunYuanDenseV1ForCausalLM: its keys differ"):
        attach(other)
