"""Keys and values that are made again in the backward pass: by any code, once for all who need them, kept nowhere."""

import gc
import weakref

import pytest
import torch
from torch.nn.functional import dropout

from palkernels import audio_kv, lal_attention
from palkernels.recompute import recomputed

HEADS, TOKENS, DIM, WIDTH = 2, 11, 8, 24


class Projection(torch.nn.Module):
    """A projection like that of a layer with adapters: it keeps more than K and V, and draws random numbers."""

    def __init__(self, device, frozen=False):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(2, HEADS * DIM, WIDTH, device=device), requires_grad=not frozen)
        self.calls = 0

    def forward(self, states):
        self.calls += 1
        normed = dropout(torch.nn.functional.rms_norm(states, (WIDTH,)), 0.3)
        projected = (torch.nn.functional.linear(normed, weight) for weight in self.weights)
        return tuple(x.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in projected)


def inputs(device, frozen=False):
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(3, TOKENS, WIDTH, device=device, generator=generator).requires_grad_(not frozen)
    text = [torch.randn(3, x, 5, DIM, device=device, generator=generator).requires_grad_() for x in (4, HEADS, HEADS)]
    return states, text


def attend(project, states, text, again, times=1, impl="auto"):
    torch.manual_seed(3)
    audio = recomputed(project, states) if again else project(states)
    return sum(lal_attention(*text, *audio, scale=0.3 * (i + 1), impl=impl) for i in range(times))


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_gradients_and_calls(device, times, frozen):
    """A backward pass calls once more, with the same random numbers, however many attentions read K and V."""
    project = Projection(device, frozen)
    states, text = inputs(device, frozen)
    leaves = text if frozen else [*text, states, project.weights]
    want = torch.autograd.grad(attend(project, states, text, False, times).square().sum(), leaves)
    out = attend(project, states, text, True, times)
    assert project.calls == 2
    for more in (1, 2):  # a graph that is kept makes them again in each backward pass
        got = torch.autograd.grad(out.square().sum(), leaves, retain_graph=more == 1)
        assert project.calls == 2 + more
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_nothing_is_kept(impl):
    """Neither K and V stay nor what the projection saves for its own gradients."""
    states, text = inputs("cpu")
    project = Projection("cpu")
    made = []

    def run(states):
        normed = torch.nn.functional.rms_norm(states, (WIDTH,))
        made.append(weakref.ref(normed.untyped_storage()))
        audio = [torch.nn.functional.linear(normed, weight) for weight in project.weights]
        made.extend(weakref.ref(x.untyped_storage()) for x in audio)
        return tuple(x.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in audio)

    out = attend(run, states, text, True, impl=impl)
    gc.collect()
    assert len(made) == 3
    assert all(ref() is None for ref in made)
    out.sum().backward()
    assert len(made) == 6
    gc.collect()
    assert all(ref() is None for ref in made)


def test_a_plain_call_without_gradients():
    states, text = inputs("cpu")
    with torch.no_grad():
        key, value = recomputed(Projection("cpu"), states)
        lal_attention(*text, key[:, :, :4], value[:, :, :4])  # a view is no mistake: nothing is kept anyway


def test_autocast_makes_no_copy_that_is_kept():
    states, text = inputs("cpu")
    weights = [torch.randn(HEADS * DIM, WIDTH).requires_grad_() for _ in range(2)]

    def project(states):
        return tuple((states @ w.t()).float().unflatten(-1, (HEADS, DIM)).transpose(1, 2) for w in weights)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        key, value = recomputed(project, states)
        assert key.dtype == value.dtype == torch.bfloat16
        out = lal_attention(*text, key, value)
    out.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in weights)


def test_compiled_graphs_keep_neither():
    """Where no hooks can be traced the compiler is told by PyTorch's checkpoint; attention is not computed again."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    states, text = inputs("cpu")
    weights = Projection("cpu").weights
    kept, backward = [], []

    def project(states):
        return tuple((states @ weight.t()).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for weight in weights)

    def keep(graph, example):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        kept.extend(tuple(node.meta["val"].shape) for node in output.args[0] if node is not None and "val" in node.meta)
        return graph

    def note(graph, example):
        backward.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def run(states, again):
        audio = recomputed(project, states) if again else project(states)
        return lal_attention(*text, *audio, impl="triton")

    backend = aot_autograd(fw_compiler=keep, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    shape = (3, HEADS, TOKENS, DIM)
    gradients = []
    for again in (False, True):
        torch._dynamo.reset()
        kept.clear()
        out = torch.compile(run, fullgraph=True, backend=backend)(states, again)
        gradients.append(torch.autograd.grad(out.sum(), [states, *text]))
        assert kept.count(shape) == (0 if again else 2)
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
    assert sum("lal_backward" in target for target in backward) == 2
    assert not any("lal_forward" in target for target in backward)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_a_graph_that_is_never_used_is_freed(impl):
    """A validation step with gradients, or one that is skipped, leaves nothing behind."""
    states, text = inputs("cpu")
    out = attend(Projection("cpu"), states, text, True, impl=impl)
    alive = [weakref.ref(x) for x in (states, *text, out)]
    del states, text, out
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


@pytest.mark.parametrize("changed", ["query", "key", "lengths"])
@pytest.mark.parametrize("again", [False, True])
def test_what_attention_saves_must_not_change(again, changed):
    project = Projection("cpu")
    states, text = inputs("cpu")
    text = [x * 1 for x in text]
    lengths = torch.full((3,), TOKENS)
    audio = recomputed(project, states) if again else project(states)
    out = lal_attention(*text, *audio, audio_lengths=lengths, impl="sdpa")
    with torch.no_grad():
        {"query": text[0], "key": text[1], "lengths": lengths}[changed].mul_(0)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        out.sum().backward()


def test_states_and_weights_of_inference_mode():
    """A frozen encoder's states, and frozen weights, may come from inference_mode."""
    with torch.inference_mode():
        states, weights = torch.randn(3, TOKENS, WIDTH), [torch.randn(HEADS * DIM, WIDTH) for _ in range(2)]
        norm = torch.ones(WIDTH)
    _, text = inputs("cpu")
    results = []
    for again in (False, True):
        audio = audio_kv(states, norm, *weights, num_kv_heads=HEADS, eps=1e-5, recompute=again)
        out = lal_attention(*text, *audio)
        results.append(torch.autograd.grad(out.square().sum(), text))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def test_what_is_not_used_is_not_held():
    """Keys alone are used: the backward pass holds no values after it."""
    project = Projection("cpu")
    states, text = inputs("cpu")
    key, _ = recomputed(project, states)
    out = lal_attention(*text, key, text[2].detach().mean() * torch.ones_like(key))
    recipe = key._palkernels_recipe[0]
    out.sum().backward()
    assert recipe.made == [None, None]
