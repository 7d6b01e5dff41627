"""What audio costs a forward besides attention: nothing per layer that is the same in all, one wait for the device."""

import pytest
import torch
from support.attached import KINDS, TOKENS, WIDTH, audio_state, batch, texts
from support.counting import count_operators, count_reads
from support.decoding import deep
from support.oracles import build
from transformers import AttentionInterface, DynamicCache, StaticCache

from palkernels import lal_attention
from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm import attention, gated_layer, request
from palkernels.model.causal_lm.fast_path import FastPath
from palkernels.model.causal_lm.flamingo import FlamingoRequest, attach_flamingo
from palkernels.model.causal_lm.gated_layer import AudioMask
from palkernels.model.causal_lm.generation import Generation


@pytest.fixture(autouse=True)
def unchecked_values(monkeypatch):
    """As on a GPU: on a CPU lal_attention checks the values of its integers, in every layer."""
    monkeypatch.setattr("palkernels.attention.checks.values_are_checked", lambda call: False)


ATTACH = {"lal": attach, "flamingo": lambda model: attach_flamingo(model, 1)}


@pytest.mark.parametrize("method", ATTACH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_waits_for_the_device_once(method, kind, training, monkeypatch):
    """Padding, holes, positions, places and shared places are all looked at, in one read. LAL's layers need no mask:
    without it, transformers reads nothing either."""
    model = build("llama").train(training)
    _, padded, mask = batch(texts(), "right" if training else "left")
    arguments = {"input_ids": padded, "attention_mask": mask, "use_cache": False}
    arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    stock = count_reads(lambda: model(**arguments), monkeypatch)
    state = audio_state(kind, torch.float32)
    ATTACH[method](model)
    with_audio = count_reads(lambda: model(**arguments, audio=state), monkeypatch)
    assert stock > 0
    assert with_audio == (1 if method == "lal" else stock + 1)


def test_without_mask_and_places_nothing_is_read(monkeypatch):
    model = build("llama").train()
    _, padded, mask = batch(texts(), "none")
    state = audio_state("lengths", torch.float32)
    # Without a mask, positions that jump need one of ones, which transformers looks at.
    stock = count_reads(lambda: model(padded, attention_mask=mask, use_cache=False), monkeypatch)
    attach(model)
    assert count_reads(lambda: model(padded, use_cache=False, audio=state), monkeypatch) == stock


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_step_by_hand_waits_for_the_device_once(cache, monkeypatch):
    """A forward that continues a cache looks at the mask anew, also where the cache counts on the device."""
    model = build("llama")
    _, padded, mask = batch(texts(), "left")
    attach(model)
    audio = {"audio": audio_state("shared, inserted", torch.float32)}
    kept = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=9)
    model(padded[:, :8], attention_mask=mask[:, :8], past_key_values=kept, **audio)
    last = {"input_ids": padded[:, 8:], "attention_mask": mask, "past_key_values": kept}
    assert count_reads(lambda: model(**last, **audio), monkeypatch) == 1


@pytest.mark.parametrize("method", ATTACH)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["greedy", "beams", "static cache", "no cache"],
)
@torch.no_grad()
def test_generation_waits_for_the_device_once(method, options, monkeypatch):
    """The prompt is looked at, in one read; no later step adds one to those of the stock model."""
    model = build("mistral-window")
    _, padded, mask = batch(texts(), "left")
    state = audio_state("shared, inserted", torch.float32)

    def run(**audio):
        model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, **options, **audio)

    stock = count_reads(run, monkeypatch)
    ATTACH[method](model)
    assert count_reads(lambda: run(audio=state), monkeypatch) == stock + 1


@torch.no_grad()
def test_drafts_wait_for_nothing(monkeypatch):
    """How often the stock model reads depends on the drafts: what prepares a forward is looked at alone."""
    model = build("llama")
    attach(model)
    reads, prepare = [], Generation.prepare
    monkeypatch.setattr(
        Generation, "prepare", lambda *args: reads.append(count_reads(lambda: prepare(*args), monkeypatch))
    )
    state = AudioState(torch.randn(1, TOKENS, WIDTH), insert_at=torch.tensor([3]))
    ids = texts()[0].repeat(2)[None]
    model.generate(ids, audio=state, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert reads[0] == 1
    assert len(reads) > 1
    assert not any(reads[1:])


@torch.no_grad()
def test_each_chunk_of_a_prompt_waits_at_most_once(monkeypatch):
    model = build("llama")
    _, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)

    def run(**audio):
        options = {"max_new_tokens": 3, "do_sample": False, "prefill_chunk_size": 2}
        model.generate(padded, attention_mask=mask, **options, **audio)

    stock = count_reads(run, monkeypatch)
    attach(model)
    assert count_reads(lambda: run(audio=state), monkeypatch) <= stock + 5  # of 9 columns


class LeastAttention:
    """An attention function that calls ``attend`` with arguments that are there already, and does nothing else."""

    def __init__(self, attend, tokens, head_dim, static):
        integers = torch.zeros(3, dtype=torch.long)
        self.attend, self.audio = attend, torch.randn(3, 2, tokens, head_dim)
        self.arguments = {"audio_lengths": integers, "audio_visible_from": integers[:, None].expand(3, tokens)}
        self.arguments |= {"text_start": integers, "text_end": integers + 9 if static else None, "impl": "triton"}

    def __call__(self, module, query, key, value, mask, scaling=None, sliding_window=None, **kwargs):
        options = {"scale": scaling, "window": sliding_window, **self.arguments}
        return self.attend(query, key, value, self.audio, self.audio, **options).transpose(1, 2), None


def no_attention(query, *args, **kwargs):
    """Stands in for lal_attention: one operator."""
    return torch.empty_like(query)


def with_least_attention(model, state, cache, attend, monkeypatch):
    """Give a model the attention function that does nothing but attend, and return what its forward takes for audio."""
    head_dim = model.model.layers[0].self_attn.head_dim
    function = LeastAttention(attend, state.num_tokens, head_dim, cache == "static")
    AttentionInterface.register("least_of_this_test", function)
    model.config._attn_implementation = "least_of_this_test"
    return {}


def with_lal(model, state, cache, attend, monkeypatch):
    """Attach a model by LAL, without audio's projection, and return what its forward takes for audio."""
    attach(model, LalConfig(impl="triton"))
    made = torch.randn(3, 2, state.num_tokens, model.model.layers[0].self_attn.head_dim)
    monkeypatch.setattr(request, "project_fused", lambda layers, *args: [(made, made)] * len(layers))
    monkeypatch.setattr(attention, "lal_attention", attend)
    return {"audio": state}


def with_flamingo(model, state, cache, attend, monkeypatch):
    """Put a gated layer before every layer of a model, and return what its forward takes for audio."""
    attach_flamingo(model, 1)
    monkeypatch.setattr(gated_layer, "lal_attention", attend)
    return {"audio": state}


def with_ready_masks(model, state, cache, attend, monkeypatch):
    """Do as :func:`with_flamingo`, with masks that are there before the forward."""
    integers = torch.zeros(3, dtype=torch.long)
    mask = AudioMask(integers, integers, None, integers[:, None].expand(3, state.num_tokens))
    sees_audio = {queries: torch.ones(3, queries, 1, dtype=torch.bool) for queries in (1, 9)}
    monkeypatch.setattr(FlamingoRequest, "masks", lambda self: (mask, sees_audio[self.texts.num_queries]))
    return with_flamingo(model, state, cache, attend, monkeypatch)


def operators(family, layers, cache, decode, give_audio, attend, monkeypatch):
    """The operators of a forward, or of one decoding step."""
    model = deep(family, layers)
    _, padded, mask = batch(texts(), "left")
    audio = give_audio(model, audio_state("inserted", torch.float32), cache, attend, monkeypatch)
    if not decode:
        return count_operators(lambda: model(padded, attention_mask=mask, use_cache=False, **audio))

    def generate(tokens):
        options = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": cache}
        return count_operators(lambda: model.generate(padded, attention_mask=mask, **options, **audio))

    return generate(3) - generate(2)


def growth(family, cache, decode, give_audio):
    """The operators that four further layers add."""
    counts = []
    for layers in (4, 8):
        with pytest.MonkeyPatch.context() as patches:
            counts.append(operators(family, layers, cache, decode, give_audio, no_attention, patches))
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("family", "method", "least"),
    [
        ("llama", with_lal, with_least_attention),
        ("mistral-window", with_lal, with_least_attention),
        ("gemma3", with_lal, with_least_attention),
        ("llama", with_flamingo, with_ready_masks),
    ],
    ids=["llama", "mistral-window", "gemma3", "flamingo"],
)
@pytest.mark.parametrize(
    ("cache", "decode"),
    [(None, False), (None, True), ("static", True)],
    ids=["forward", "decode step", "static decode step"],
)
@torch.no_grad()
def test_a_layer_does_nothing_but_attend(family, cache, decode, method, least):
    """Layers cost what they cost where all that is the same in all of them is there already, and no operator besides.

    For LAL that is an attention function whose arguments are ready; for Flamingo, new layers whose masks are.
    """
    assert growth(family, cache, decode, method) == growth(family, cache, decode, least) > 0


@torch.no_grad()
def test_attention_is_one_operator(monkeypatch):
    """By our kernels: as many operators as with a stand-in that is one."""
    stand_in, ours = (
        operators("llama", 1, None, True, with_lal, attend, monkeypatch) for attend in (no_attention, lal_attention)
    )
    assert stand_in == ours


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
def test_the_projection_is_chosen_once(generate, gradients, monkeypatch):
    """Whether audio_kv or the layers' modules project is found out once, however many layers and steps there are."""
    model = build("llama")
    attach(model)
    _, padded, mask = batch(texts(), "left")
    state, asked = audio_state("inserted", torch.float32), []
    for name in ("norm_offset", "why_not"):
        method = getattr(FastPath, name)

        def counted(self, *args, name=name, method=method):
            asked.append(name)
            return method(self, *args)

        monkeypatch.setattr(FastPath, name, counted)
    with torch.set_grad_enabled(gradients):
        if generate:
            model.generate(padded, attention_mask=mask, audio=state, max_new_tokens=4, do_sample=False)
        else:
            model(padded, attention_mask=mask, audio=state)
    assert asked == ["norm_offset", "why_not"]
