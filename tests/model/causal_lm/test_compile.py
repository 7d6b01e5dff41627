"""torch.compile of an attached model: whole graphs, and the eager results."""

import pytest
import torch
from support.attached import (
    attached,
    audio_state,
    batch,
    texts,
    unpadded,
)
from support.flamingo import open_gates
from support.oracles import build
from support.thorough import combinations

from palkernels.model import attach, attach_flamingo


@pytest.mark.parametrize("way", ["lal", "flamingo"])
def test_compiled_model_has_the_eager_gradients(way):
    """Graph breaks are allowed, wrong gradients are not."""
    model = build("llama").train()
    _, padded, _ = batch(texts(), "none")
    if way == "lal":
        attach(model)
    else:
        open_gates(attach_flamingo(model, every=1))
    torch._dynamo.reset()
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        state = audio_state("prefix", torch.float32)
        state.states.requires_grad_()
        run(padded, audio=state, labels=padded).loss.backward()
        gradients.append(state.states.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("family", "kind"), combinations(["llama", "qwen2-window", "gemma3", "phi3"], ["prefix", "shared, inserted"])
)
@torch.no_grad()
def test_compiled_forward_is_one_graph(family, kind):
    model, keywords = attached(family, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = (run(**keywords, use_cache=False).logits for run in (compiled, model))
    mask = keywords["attention_mask"]
    torch.testing.assert_close(unpadded(got, mask), unpadded(want, mask))
    torch.testing.assert_close(compiled(keywords["input_ids"]).logits, model(keywords["input_ids"]).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_compiled_static_decode_is_one_graph(family):
    """Every step of generation, prefill included, in whole graphs; one graph serves all decoding steps."""
    model, keywords = attached(family, "shared, inserted")
    options = keywords | {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(**options)
    torch._dynamo.reset()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=count, fullgraph=True)
    got = model.generate(**options, cache_implementation="static")
    assert torch.equal(got, want)
    assert len(graphs) <= (2 if family == "llama" else 5)
