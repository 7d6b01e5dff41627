"""torch.compile of an attached model: whole graphs, and the eager results.

Of two layers: the second takes what the first has made, and every further one takes as long to trace.
"""

from functools import partial

import pytest
import torch
from support.attached import (
    attached,
    audio_state,
    batch,
    texts,
    unpadded,
)
from support.compiled import in_whole_graphs
from support.flamingo import open_gates
from support.oracles import build
from support.thorough import EVERYTHING, combinations
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

from palkernels.model import attach, attach_flamingo


@pytest.mark.parametrize("way", ["lal", "flamingo"])
def test_compiled_model_has_the_eager_gradients(way):
    """Graph breaks are allowed, wrong gradients are not."""
    model = build("llama", layers=2).train()
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), combinations(["llama", "qwen2-window", "gemma3", "phi3"], ["prefix", "shared, inserted"])
)
@torch.no_grad()
def test_compiled_forward_is_one_graph(family, kind):
    model, keywords = attached(family, kind, layers=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = (run(**keywords, use_cache=False).logits for run in (compiled, model))
    mask = keywords["attention_mask"]
    torch.testing.assert_close(unpadded(got, mask), unpadded(want, mask))
    if kind == "prefix":
        torch.testing.assert_close(compiled(keywords["input_ids"]).logits, model(keywords["input_ids"]).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"] if EVERYTHING else ["llama"])
@torch.no_grad()
def test_compiled_static_decode_is_one_graph(family):
    """Every step of generation, prefill included, in whole graphs; one graph serves all decoding steps."""
    model, keywords = attached(family, "shared, inserted", layers=2)
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


@pytest.mark.slow
@pytest.mark.parametrize(("family", "most"), [("llama", 1), ("gemma2", 2), *[("phi3", 1)] * EVERYTHING])
@torch.no_grad()
def test_generate_compiles_its_steps_once(family, most):
    """transformers compiles the steps behind the prompt: one graph serves them, and those of the next call, with the
    eager tokens. A second one is made for the window of transformers' own cache, which counts its first steps."""
    model, keywords = attached(family, "shared, inserted", layers=2)
    options = keywords | {"max_new_tokens": 22, "do_sample": False, "eos_token_id": None}
    want = model.generate(**options)
    graphs, static = in_whole_graphs()
    for _ in range(2):
        assert torch.equal(model.generate(**options, **static), want)
        assert len(graphs) == most


@pytest.mark.slow
@pytest.mark.parametrize("attaching", [attach, partial(attach_flamingo, every=1)], ids=["lal", "flamingo"])
@torch.no_grad()
def test_a_compiled_step_has_the_audio_where_it_is(attaching):
    """A CUDA graph copies its inputs into memory of its own, but for those that stay where they are: of a model's keys
    and values none is left to copy."""
    model = build("llama", layers=2)
    attaching(model)
    _, padded, mask = batch(texts(), "left")
    copied = []

    def compiler(graph, inputs):
        stays = set(TracingContext.get().fw_metadata.static_input_indices)
        copied.append([x.shape for i, x in enumerate(inputs) if i not in stays and x.is_floating_point()])
        return graph.forward

    _, static = in_whole_graphs(aot_autograd(fw_compiler=compiler))
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    model.generate(padded, audio=audio_state("prefix", torch.float32), **options, **static)
    assert copied == [[]]
