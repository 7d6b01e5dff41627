"""What audio costs the host in a decoding step, where Python and not the device sets the pace: no more than stock."""

import functools

import pytest
import torch
from support.attached import audio_state, batch, texts
from support.counting import count_reads
from support.decoding import (
    CACHES,
    HOST,
    MOST,
    ONE_OPERATOR,
    REPEATED,
    deep,
    one_operator,
    per_layer_and_step,
    per_step,
)
from support.thorough import combinations

from palkernels.model import LalConfig, attach
from palkernels.model.causal_lm import attention

# By kind of audio, the padding of the batch.
KINDS = {"prefix": "none", "lengths": "left", "inserted": "left", "two clips": "left", "per layer": "none"}


@pytest.fixture(autouse=True)
def attention_is_one_operator(monkeypatch):
    monkeypatch.setattr(attention, "lal_attention", one_operator)


def generating(family, cache, side, kind=None, change=lambda model: None):
    """From a number of layers to a function that generates, with audio of a kind or without."""
    _, padded, mask = batch(texts(), side)

    def model_of(layers):
        model = deep(family, layers)
        change(model)
        audio = {}
        if kind is not None:
            audio = {"audio": audio_state(kind, torch.float32, num_layers=layers)}
        options = {"attention_mask": mask, "do_sample": False, **CACHES[cache], **audio}
        return lambda tokens: model.generate(padded, max_new_tokens=tokens, **options)

    return model_of


def with_one_operator(model):
    model.set_attn_implementation(ONE_OPERATOR)


@functools.cache
def of_stock(family, cache, side, counted):
    change = with_one_operator if counted == "operators" else lambda model: None
    return per_layer_and_step(generating(family, cache, side, change=change), HOST[counted])


MODELS = [
    *(("llama", kind) for kind in KINDS),
    *((family, "inserted") for family in ("qwen2", "qwen3", "mistral-window", "gemma3", "phi3")),
]


@pytest.mark.parametrize(("model", "cache", "counted"), combinations(MODELS, CACHES, HOST))
def test_a_layer_with_audio_asks_no_more_of_the_host(model, cache, counted):
    """Per step: as many operators as a stock layer, but for attention's own, and at most 1.3 times its calls."""
    family, kind = model
    stock = of_stock(family, cache, KINDS[kind], counted)
    change = functools.partial(attach, config=LalConfig(impl="sdpa"))
    ours = per_layer_and_step(generating(family, cache, KINDS[kind], kind, change), HOST[counted])
    assert min(stock.values()) > 0
    if counted == "operators":
        assert ours == stock
    else:
        for name, calls in stock.items():
            assert ours[name] + REPEATED[name] <= MOST * calls, name


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_of_a_small_model_asks_hardly_more(layers, cache):
    """What is made once per step counts most where there are few layers."""
    change = functools.partial(attach, config=LalConfig(impl="sdpa"))
    stock, ours = (
        per_step(generating("llama", cache, "left", *audio)(layers), HOST["calls"])["Python calls"]
        for audio in ((), ("inserted", change))
    )
    assert 0 < ours <= MOST * stock


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind, cache, monkeypatch):
    """But for what generate itself waits for, as whether all texts have ended: it is a stock model without masks."""
    attached = generating("llama", cache, KINDS[kind], kind, functools.partial(attach, config=LalConfig(impl="sdpa")))
    stock = generating("llama", cache, KINDS[kind], change=with_one_operator)
    counts = [
        per_step(model_of(2), lambda run: {"reads": count_reads(run, monkeypatch)}) for model_of in (stock, attached)
    ]
    assert counts[0] == counts[1]


def test_an_attached_layer_without_audio_asks_hardly_more():
    stock = of_stock("llama", "dynamic", "left", "calls")
    ours = per_layer_and_step(generating("llama", "dynamic", "left", change=attach), HOST["calls"])
    for name, calls in stock.items():
        assert ours[name] <= MOST * calls, name


class Recorder:
    """Stands in for lal_attention, and keeps what the layers hand it: by step, then by layer."""

    def __init__(self, layers):
        self.layers, self.calls = layers, []

    def __call__(self, query, key, value, audio_key, audio_value, **options):
        self.calls.append(options)
        return one_operator(query)

    def steps(self):
        """The integers of each layer, of each forward but the prompt's."""
        names = ("audio_lengths", "audio_index", "audio_visible_from", "text_start", "text_end")
        forwards = range(self.layers, len(self.calls), self.layers)
        return [
            [{name: call[name] for name in names} for call in self.calls[first : first + self.layers]]
            for first in forwards
        ]


@pytest.mark.parametrize("kind", ["prefix", "inserted", "shared, inserted"])
@pytest.mark.parametrize(("family", "cache"), [("llama", "dynamic"), ("llama", "static"), ("gemma3", "static")])
def test_integers_are_the_same_in_layers_and_laid_out_alike_in_steps(family, cache, kind, monkeypatch):
    """So that whoever launches kernels may keep what depends on the arguments' layout. Of a cache that grows, the
    integers are even the same tensors in all steps."""
    recorder = Recorder(layers=4)
    monkeypatch.setattr(attention, "lal_attention", recorder)
    change = functools.partial(attach, config=LalConfig(impl="sdpa"))
    generating(family, cache, "left", kind, change)(4)(5)
    steps = recorder.steps()
    assert len(steps) == 4

    def layouts(integers):
        return [None if x is None else (x.dtype, tuple(x.shape), x.stride()) for x in integers.values()]

    for layer in range(4):
        assert len({str(layouts(step[layer])) for step in steps}) == 1
        for name, integers in steps[0][layer].items():  # the kernels take strides of one of them
            assert integers is None or integers.is_contiguous() or name == "audio_visible_from"
    alike = range(0, 4, 2) if family == "gemma3" else range(4)  # the windows' layers, else all
    for step in steps:
        assert len({tuple(map(id, step[layer].values())) for layer in alike}) == 1
    if cache == "dynamic":
        assert len({tuple(map(id, step[0].values())) for step in steps}) == 1
    if kind == "prefix":
        assert steps[0][0]["audio_visible_from"] is None
    assert (steps[0][0]["text_end"] is None) == (cache == "dynamic")
    assert steps[0][0]["text_start"] is not None
