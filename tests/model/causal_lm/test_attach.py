"""An attached model against the oracles: stock models on the concatenated sequence, and layers written by hand."""

import copy
import functools
import inspect
import itertools

import pytest
import torch
from support.oracles import FAMILIES, LENGTH_DEPENDENT, SIZES, build, oracle_logits, rows_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)

from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm import fast_path as fused
from palkernels.model.causal_lm.texts import count_cached

LENGTHS = (7, 4, 9)  # of the texts in a batch
TOKENS = 6  # audio tokens per row
WIDTH = 64


def texts(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 101, (n,), generator=generator) for n in LENGTHS]


def batch(ids, side):
    """Padded ids and mask; ``side`` is "left", "right", or "none" for equal lengths."""
    longest = max(map(len, ids))
    if side == "none":
        ids = [row.repeat(longest)[:longest] for row in ids]
    rows, masks = [], []
    for row in ids:
        gap = longest - len(row)
        pad = (gap, 0) if side == "left" else (0, gap)
        rows.append(torch.nn.functional.pad(row, pad, value=0))
        masks.append(torch.nn.functional.pad(torch.ones(len(row), dtype=torch.long), pad))
    return ids, torch.stack(rows), torch.stack(masks)


def audio_state(kind, dtype, layers="all", num_layers=3):
    """One state for each way audio can be given."""
    generator = torch.Generator().manual_seed(5)

    def states(rows):
        return torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "prefix":
        return AudioState(states(3))
    if kind == "lengths":
        return AudioState(states(3), lengths=torch.tensor([6, 0, 3]))
    if kind == "inserted":
        return AudioState(states(3), lengths=torch.tensor([4, 6, 5]), insert_at=torch.tensor([3, 4, 0]))
    if kind == "two clips":
        insert_at = torch.tensor([[1, 1, 1, 5, 5, 5], [0, 0, 2, 2, 2, 2], [9, 9, 9, 9, 9, 9]])
        return AudioState(states(3), lengths=torch.tensor([6, 5, 6]), insert_at=insert_at)
    if kind == "shared":
        return AudioState(states(2), lengths=torch.tensor([6, 2]), index=torch.tensor([1, 0, 0]))
    if kind == "shared, inserted":
        return AudioState(states(2), index=torch.tensor([1, 0, 0]), insert_at=torch.tensor([2, 4, 1]))
    if kind == "per layer":
        chosen = range(num_layers) if layers == "all" else layers
        return AudioState(
            [states(3) if i in chosen else None for i in range(num_layers)], lengths=torch.tensor([6, 1, 3])
        )
    raise ValueError(kind)


KINDS = ("prefix", "lengths", "inserted", "two clips", "shared", "shared, inserted", "per layer")


def oracle_rows(model, rope, ids, state, layers):
    chosen = range(3) if layers == "all" else layers
    stock = copy.deepcopy(model)
    return [oracle_logits(stock, row, chosen, rope) for row in rows_of(ids, LENGTHS, state, 3)]


def unpadded(logits, mask):
    return [row[keep.bool()] for row, keep in zip(logits, mask, strict=True)]


def largest_difference(got, want):
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["sequence", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(family, rope, kind):
    """Left- and right-padded and unpadded batches, all layers and a subset: fp32 within 1e-5."""
    model = build(family)
    for side, layers in (("left", "all"), ("right", (0, 2)), ("none", (1,)), ("left", (1, 2))):
        ids, padded, mask = batch(texts(), side)
        state = audio_state(kind, torch.float32, layers)
        handle = attach(model, LalConfig(layers=layers, rope=rope))
        with torch.no_grad():
            got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
            handle.detach()
            want = oracle_rows(model, rope, ids, state, layers)
        assert largest_difference(got, want) <= 1e-5, (side, layers)


@pytest.mark.parametrize("family", LENGTH_DEPENDENT)
@pytest.mark.parametrize("rope", ["sequence", "none"])
@torch.no_grad()
def test_rope_that_depends_on_the_length(family, rope):
    """Audio and text share the frequencies of the row's last position, on both sides of the change at 12."""
    model = build(family)
    stock = copy.deepcopy(model)
    attach(model, LalConfig(rope=rope))
    differ = set()
    for tokens, insert_at in ((2, 0), (2, 3), (6, 0), (6, 3), (6, 8)):
        ids = texts()[0].repeat(2)[:9][None]
        state = AudioState(torch.randn(1, tokens, WIDTH), insert_at=torch.tensor([insert_at]))
        want = oracle_logits(stock, rows_of(ids, (9,), state, 3)[0], range(3), rope)
        assert float((model(ids, audio=state).logits[0] - want).abs().max()) <= 1e-5, (tokens, insert_at)
        cos, _ = model.model.rotary_emb(want, torch.arange(9 + tokens)[None])
        differ.add(cos[0, 1, :4].tolist().__repr__())
    assert len(differ) >= 2  # the frequencies did change


@pytest.mark.parametrize("family", LENGTH_DEPENDENT)
def test_rope_that_depends_on_the_length_refuses_audio_behind_the_text(family):
    model = build(family)
    attach(model)
    ids = texts()[0].repeat(2)[:9][None]
    state = AudioState(torch.randn(1, 6, WIDTH), insert_at=torch.tensor([9]))
    with pytest.raises(ValueError, match="audio must stand before the last token of the longest text"):
        model.generate(ids, audio=state, max_new_tokens=2)


@torch.no_grad()
def test_generation_with_long_rope():
    """From a prompt beyond the change on, cached keys and the oracle's have the same frequencies."""
    model = build("phi3-longrope")
    ids = texts()[0].repeat(2)[None]
    state = AudioState(torch.randn(1, 6, WIDTH), insert_at=torch.tensor([2]))
    row, stock = rows_of(ids, (14,), state, 3)[0], copy.deepcopy(model)
    for _ in range(6):
        row.ids = torch.cat([row.ids, oracle_logits(stock, row, range(3), "sequence")[-1].argmax().view(1)])
    attach(model)
    assert torch.equal(model.generate(ids, audio=state, max_new_tokens=6, do_sample=False)[0], row.ids)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_other_implementations(impl):
    model = build("llama")
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    with torch.no_grad():
        handle = attach(model, LalConfig(impl=impl))
        got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
        handle.detach()
        assert largest_difference(got, oracle_rows(model, "sequence", ids, state, "all")) <= 1e-5


GRADIENT_CASES = [
    *itertools.product(FAMILIES, ["sequence", "none"], ["inserted", "shared, inserted", "per layer"], ["sdpa"]),
    ("llama", "sequence", "shared, inserted", "triton"),
    ("qwen2", "none", "per layer", "triton"),
]


@pytest.mark.parametrize(("family", "rope", "kind", "impl"), GRADIENT_CASES)
def test_gradients(family, rope, kind, impl):
    """Loss gradients in float64 for the audio states and every weight: within 1e-6 of the oracle's."""
    ids, padded, mask = batch(texts(), "left")
    weights = [torch.randn(len(row), 101, generator=torch.Generator().manual_seed(3)).double() for row in ids]
    results = []
    for attached in (True, False):
        model = build(family, torch.float64)
        state = audio_state(kind, torch.float64, "all")
        leaves = [state.states] if isinstance(state.states, torch.Tensor) else state.states
        for leaf in leaves:
            leaf.requires_grad_()
        if attached:
            attach(model, LalConfig(rope=rope, impl=impl))
            logits = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
        else:
            logits = [oracle_logits(model, row, range(3), rope) for row in rows_of(ids, LENGTHS, state, 3)]
        loss = sum((row * weight).sum() for row, weight in zip(logits, weights, strict=True))
        loss.backward()
        named = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({**named, **{f"states {i}": leaf.grad for i, leaf in enumerate(leaves)}})
    got, want = results
    assert got.keys() == want.keys()
    assert any(".k_proj." in name or ".qkv_proj." in name for name in got)
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        assert float((got[name] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), name


def oracle_greedy(model, rope, ids, state, steps):
    """Uncached: the whole oracle again for every token."""
    rows, chosen = rows_of(ids, LENGTHS, state, 3), []
    stock = copy.deepcopy(model)
    for row in rows:
        for _ in range(steps):
            logits = oracle_logits(stock, row, range(3), rope)[-1]
            row.ids = torch.cat([row.ids, logits.argmax().view(1)])
        chosen.append(row.ids[-steps:])
    return torch.stack(chosen)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["sequence", "none"])
@pytest.mark.parametrize("kind", ["prefix", "two clips", "shared, inserted"])
@torch.no_grad()
def test_greedy_generation(family, rope, kind):
    """Cached generation from a left-padded batch, also past a sliding window: the uncached oracle's tokens."""
    model = build(family)
    ids, padded, mask = batch(texts(), "left")
    state = audio_state(kind, torch.float32)
    want = oracle_greedy(model, rope, ids, state, 6)
    attach(model, LalConfig(rope=rope))
    got = model.generate(padded, attention_mask=mask, audio=state, max_new_tokens=6, do_sample=False)
    assert torch.equal(got[:, -6:], want)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_beam_search(family):
    """Beams from cached K/V equal beams that recompute everything, and score as the oracle scores them."""
    model = build(family)
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("shared, inserted", torch.float32)
    attach(model)
    options = {
        "attention_mask": mask,
        "audio": state,
        "num_beams": 3,
        "max_new_tokens": 5,
        "do_sample": False,
    }
    cached = model.generate(padded, **options, return_dict_in_generate=True, output_scores=True, num_return_sequences=2)
    fresh = model.generate(padded, **options, num_return_sequences=2, use_cache=False)
    assert torch.equal(cached.sequences, fresh)
    model._palkernels_handle.detach()
    for i, sequence in enumerate(cached.sequences):
        row = rows_of(ids, LENGTHS, state, 3)[i // 2]
        new = sequence[-5:]
        row.ids = torch.cat([row.ids, new])
        scores = oracle_logits(copy.deepcopy(model), row, range(3), "sequence").log_softmax(-1)[-6:-1]
        total = scores.gather(1, new[:, None]).sum() / 5
        assert float((cached.sequences_scores[i] - total).abs()) <= 1e-5


def attached(family, kind):
    """An attached model and a left-padded batch for it, by name."""
    model = build(family)
    attach(model)
    _, padded, mask = batch(texts(), "left")
    return model, {"input_ids": padded, "attention_mask": mask, "audio": audio_state(kind, torch.float32)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["prefix", "two clips", "shared, inserted"])
@torch.no_grad()
def test_static_cache(family, kind):
    """A preallocated cache, longer than the text, gives the tokens of one that grows, also past a window."""
    model, given = attached(family, kind)
    want = model.generate(**given, max_new_tokens=8, do_sample=False)
    static = model.generate(**given, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(static, want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_beams_with_a_static_cache(family):
    model, given = attached(family, "shared, inserted")
    options = given | {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options, cache_implementation="static"), model.generate(**options))


def test_a_static_cache_counts_on_the_models_device():
    """An empty one counts in Python: its count must not end up on the CPU beside a model elsewhere."""
    cache = StaticCache(build("llama").config, max_cache_len=8)
    assert count_cached(cache, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "shared, inserted"])
@torch.no_grad()
def test_static_decoding_by_hand(compiled, kind):
    """A loop over forward with a preallocated cache and one mask for all steps, in whole graphs or without: the logits
    of one forward."""
    model, given = attached("llama", kind)
    padded, mask, state = given.values()
    whole = model(**given, use_cache=False).logits
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    cache = StaticCache(model.config, max_cache_len=12)
    full = torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], dim=1)
    parts = [model(padded[:, :5], attention_mask=full, audio=state, past_key_values=cache).logits]
    for t in range(5, padded.shape[1]):
        out = step(padded[:, t : t + 1], attention_mask=full, audio=state, past_key_values=cache)
        parts.append(out.logits)
    assert largest_difference(unpadded(torch.cat(parts, 1), mask), unpadded(whole, mask)) <= 1e-5


@torch.no_grad()
def test_sampling_takes_the_audio():
    """Sampled tokens are those that the oracle's probabilities and the same random numbers give."""
    model = build("qwen3")
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    attach(model)
    options = {"attention_mask": mask, "audio": state, "max_new_tokens": 3, "do_sample": True, "top_k": 0}
    torch.manual_seed(3)
    got = model.generate(padded, **options, num_return_sequences=2)[:, -3:]
    model._palkernels_handle.detach()
    rows = [copy.copy(row) for row in rows_of(ids, LENGTHS, state, 3) for _ in range(2)]
    torch.manual_seed(3)
    for _ in range(3):
        logits = [oracle_logits(copy.deepcopy(model), row, range(3), "sequence")[-1] for row in rows]
        for row, token in zip(rows, torch.multinomial(torch.stack(logits).softmax(-1), 1), strict=True):
            row.ids = torch.cat([row.ids, token])
    assert torch.equal(got, torch.stack([row.ids[-3:] for row in rows]))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
@pytest.mark.parametrize("draft", ["assistant", "attached assistant", "prompt lookup"])
@torch.no_grad()
def test_assisted_generation(family, draft):
    """A draft changes how often the model runs, not its tokens; an assistant sees the text only."""
    model = build(family)
    ids = torch.cat([texts()[0], texts()[0]])[None]
    state = AudioState(torch.randn(1, TOKENS, WIDTH), insert_at=torch.tensor([3]))
    attach(model)
    want = model.generate(ids, audio=state, max_new_tokens=12, do_sample=False)
    if draft == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    else:
        assistant = build(family, seed=0 if family == "llama" else 1)
        if draft == "attached assistant":
            attach(assistant)
        options = {"assistant_model": assistant}
    got = model.generate(ids, audio=state, max_new_tokens=12, do_sample=False, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_conversation_that_continues_a_cache(family, cache):
    """The second turn brings a second clip; audio is told from the start, the cache holds the text only."""
    model = build(family)
    attach(model)
    question, clip, second_clip = texts()[0][None], torch.randn(1, 4, WIDTH), torch.randn(1, 3, WIDTH)
    kept = StaticCache(model.config, max_cache_len=40) if cache == "static" else DynamicCache(config=model.config)
    options = {"max_new_tokens": 3, "do_sample": False, "past_key_values": kept}
    first = model.generate(question, audio=AudioState(clip, insert_at=torch.tensor([1])), **options)
    turn = torch.cat([first, texts()[1][None]], dim=1)
    places = torch.tensor([[1, 1, 1, 1, *[first.shape[1] + 1] * 3]])
    both = AudioState(torch.cat([clip, second_clip], dim=1), insert_at=places)
    continued = model.generate(turn, audio=both, **options)
    whole = model.generate(turn, audio=both, max_new_tokens=3, do_sample=False)
    assert torch.equal(continued, whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ["sequence", "none"])
@torch.no_grad()
def test_fused_projection_is_used_and_right(family, rope, monkeypatch):
    """K and V come from audio_kv, without gradients all layers at once where they share states, and equal the
    modules'."""
    model = build(family)
    handle = attach(model, LalConfig(rope=rope))
    assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}
    calls = []
    audio_kv = fused.audio_kv
    monkeypatch.setattr(fused, "audio_kv", lambda *a, **k: calls.append((len(a[0]), len(a[1]))) or audio_kv(*a, **k))
    _, padded, mask = batch(texts(), "left")
    for kind in ("prefix", "shared, inserted", "per layer"):
        options = {"attention_mask": mask, "audio": audio_state(kind, torch.float32)}
        calls.clear()
        found = [model(padded, **options).logits]
        model.generate(padded, **options, max_new_tokens=3, num_beams=2, do_sample=False)
        rows = 2 if "shared" in kind else 3
        assert calls == ([(rows, 1)] * 6 if kind == "per layer" else [(rows, 3)] * 2)  # beams add no rows
        calls.clear()
        with torch.enable_grad():
            found.append(model(padded, **options).logits.detach())
        assert calls == [(rows, 1)] * 3
        hook = model.model.layers[1].input_layernorm.register_forward_hook(lambda *args: None)
        slow = model(padded, **options).logits
        assert calls == [(rows, 1)] * 3
        hook.remove()
        for fast in found:
            assert largest_difference(unpadded(fast, mask), unpadded(slow, mask)) <= 1e-5


@torch.no_grad()
def test_what_is_not_plain_goes_through_modules():
    model = build("llama")
    attention = [layer.self_attn for layer in model.model.layers]
    handle = attach(model)

    class Halved(type(model.model.layers[0].input_layernorm)):
        def forward(self, x):
            return super().forward(x) / 2

    def halve():
        new, old = Halved(WIDTH), model.model.layers[1].input_layernorm
        new.load_state_dict(old.state_dict())
        model.model.layers[1].input_layernorm = new
        return old

    for change, undo, reason in (
        (
            lambda: torch.nn.modules.module.register_module_forward_hook(lambda *args: None),
            lambda made: made.remove(),
            "all modules have hooks",
        ),
        (
            halve,
            lambda made: setattr(model.model.layers[1], "input_layernorm", made),
            "its norms are others than at attach",
        ),
        (lambda: attention[1].k_proj.register_forward_hook(print), lambda made: made.remove(), "k_proj has hooks"),
        (
            lambda: setattr(attention[2], "v_proj", torch.nn.Sequential(attention[2].v_proj)),
            lambda made: setattr(attention[2], "v_proj", attention[2].v_proj[0]),
            "v_proj is a Sequential, not a plain Linear",
        ),
        (
            lambda: setattr(attention[0].k_proj, "forward", attention[0].k_proj.forward),
            lambda made: delattr(attention[0].k_proj, "forward"),
            "k_proj has a forward of its own",
        ),
    ):
        made = change()
        report = handle.report()
        assert {layer.audio_kv for layer in report.layers} == {"modules"}
        assert reason in str(report)
        undo(made)
        assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
@torch.no_grad()
def test_a_bias_that_comes_after_attach(name):
    model = build("llama")
    handle = attach(model)
    for layer in model.model.layers:
        getattr(layer.self_attn, name).bias = torch.nn.Parameter(torch.randn(32))
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}
    got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
    handle.detach()
    assert largest_difference(got, oracle_rows(model, "sequence", ids, state, "all")) <= 1e-5


@torch.no_grad()
def test_audio_is_projected_once_per_generate():
    model = build("llama")
    _, padded, mask = batch(texts(), "left")
    attach(model)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[:2]))
    state = audio_state("shared", torch.float32)
    for beams in (1, 3):
        calls.clear()
        model.generate(padded, attention_mask=mask, audio=state, max_new_tokens=4, num_beams=beams, do_sample=False)
        # Once for each of three layers, a row for each clip; the other calls are the text's.
        assert [shape for shape in calls if shape[1] == TOKENS] == [(2, TOKENS)] * 3


@torch.no_grad()
def test_a_state_can_be_used_again():
    """Nothing is kept from an earlier call: after a change of weights, what a new model and a new state give."""
    model, other = build("llama"), build("llama")
    state, fresh = (audio_state("prefix", torch.float32) for _ in range(2))
    _, padded, mask = batch(texts(), "left")

    def logits(model, state):
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(model.generate(padded, attention_mask=mask, audio=state, **options).logits)

    attach(model)
    attach(other)
    first = logits(model, state)
    assert torch.equal(logits(model, state), first)
    for changed in (model, other):
        changed.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    want = logits(other, fresh)
    assert not torch.equal(want, first)
    assert torch.equal(logits(model, state), want)


@pytest.mark.parametrize(
    ("family", "attention"),
    # transformers 5.23 refuses to run Gemma2 on "sdpa"
    [
        (family, attention)
        for family in FAMILIES
        for attention in ("sdpa", "eager")
        if (family, attention) != ("gemma2", "sdpa")
    ],
)
@torch.no_grad()
def test_without_audio_and_after_detach_bitwise_stock(family, attention):
    model = build(family)
    model.set_attn_implementation(attention)
    _, padded, mask = batch(texts(), "left")
    stock = model(padded, attention_mask=mask).logits
    tokens = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    handle = attach(model, LalConfig(layers=(0, 2)))
    assert torch.equal(model(padded, attention_mask=mask).logits, stock)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False), tokens)
    with_audio = model(padded, attention_mask=mask, audio=audio_state("prefix", torch.float32)).logits
    assert not torch.equal(with_audio, stock)
    handle.detach()
    handle.detach()
    assert torch.equal(model(padded, attention_mask=mask).logits, stock)
    assert "forward" not in model.__dict__
    assert "audio" not in inspect.signature(model.forward).parameters


@torch.no_grad()
def test_what_wraps_an_attached_model_outlives_detach():
    """Hooks that accelerate puts on the model after attach stay; what they hold of ours is the stock model's."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Note(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(sorted(kwargs))
            return args, kwargs

    model, calls = build("llama"), []
    _, padded, _ = batch(texts(), "none")
    state = audio_state("prefix", torch.float32)
    stock = model(padded).logits
    tokens = model.generate(padded, max_new_tokens=2, do_sample=False)
    handle = attach(model)
    generate = model.generate
    with_audio = model(padded, audio=state).logits
    add_hook_to_module(model, Note())
    assert torch.equal(model(padded, audio=state).logits, with_audio)
    handle.detach()
    for _ in range(2):
        assert torch.equal(model(padded).logits, stock)
        assert torch.equal(generate(padded, max_new_tokens=2, do_sample=False), tokens)
        assert "audio" not in inspect.signature(model.forward).parameters
        for call in (model, generate):
            with pytest.raises(ValueError, match="is given audio, got it after detach"):
                call(padded, audio=state)
        again = attach(model)
        assert torch.equal(model(padded, audio=state).logits, with_audio)
        again.detach()
        remove_hook_from_module(model)
    assert ["audio"] in calls
    assert [] in calls


@torch.no_grad()
def test_accelerate_prepares_and_unwraps():
    """unwrap_model binds the forward that it finds to the model once more."""
    from accelerate import Accelerator

    model, given = attached("llama", "inserted")
    want = model(**given).logits, model(given["input_ids"]).logits
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    assert 0 < largest_difference([prepared(**given).logits], [want[0]]) < 0.5  # in bfloat16
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**given).logits, want[0])
    assert torch.equal(unwrapped(given["input_ids"]).logits, want[1])
    unwrapped.generate(**given, max_new_tokens=2, do_sample=False)
    unwrapped._palkernels_handle.detach()
    assert torch.equal(unwrapped(given["input_ids"]).logits, want[1])


@torch.no_grad()
def test_no_layers_is_the_text_alone():
    model = build("llama")
    _, padded, _ = batch(texts(), "none")
    stock = model(padded).logits
    attach(model, LalConfig(layers=(), rope="none"))
    assert torch.equal(model(padded, audio=audio_state("prefix", torch.float32)).logits, stock)


@torch.no_grad()
def test_audio_of_length_zero_is_the_text_alone():
    model = build("llama")
    ids, padded, mask = batch(texts(), "left")
    want = [model(row[None]).logits[0] for row in ids]
    attach(model)
    state = AudioState(torch.full((3, TOKENS, WIDTH), 7.0), lengths=torch.zeros(3, dtype=torch.int32))
    got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
    assert largest_difference(got, want) <= 1e-5
    empty = AudioState(torch.zeros(3, 0, WIDTH), insert_at=torch.tensor([1, 2, 0]))
    got = unpadded(model(padded, attention_mask=mask, audio=empty).logits, mask)
    assert largest_difference(got, want) <= 1e-5


def test_without_a_mask_positions_may_jump():
    """Without a mask and cache, transformers reads a jump in positions as packed sequences and cuts the attention of
    layers without audio."""
    model = build("llama")
    _, padded, mask = batch(texts(), "none")
    state = audio_state("inserted", torch.float32)
    attach(model, LalConfig(layers=(1,)))
    with torch.no_grad():
        without = model(padded, audio=state, use_cache=False).logits
        torch.testing.assert_close(without, model(padded, attention_mask=mask, audio=state).logits)
    options = {"audio": state, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(padded, **options, use_cache=False), model.generate(padded, **options))


@torch.no_grad()
def test_position_ids_are_the_texts_own():
    model = build("llama")
    _, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    attach(model)
    want = model(padded, attention_mask=mask, audio=state).logits
    own = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model(padded, attention_mask=mask, position_ids=own, audio=state).logits, want)
    with pytest.raises(ValueError, match="position_ids must count each row's own text from 0"):
        model(padded, attention_mask=mask, position_ids=own + 1, audio=state)


@torch.no_grad()
def test_chunked_prefill():
    """The first chunks of a short text are all padding: the text starts where the whole prompt says."""
    model = build("llama")
    _, padded, mask = batch(texts(), "left")
    attach(model)
    options = {"attention_mask": mask, "audio": audio_state("inserted", torch.float32), "max_new_tokens": 4}
    want = model.generate(padded, **options, do_sample=False)
    assert torch.equal(model.generate(padded, **options, do_sample=False, prefill_chunk_size=2), want)


@torch.no_grad()
def test_cached_decoding_by_hand():
    """A loop over forward with a growing cache gives what one forward gives."""
    model = build("qwen2-window")
    _, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    attach(model)
    whole = model(padded, attention_mask=mask, audio=state, use_cache=False).logits
    out = model(padded[:, :5], attention_mask=mask[:, :5], audio=state, use_cache=True)
    parts = [out.logits]
    for t in range(5, padded.shape[1]):
        out = model(
            padded[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            audio=state,
            past_key_values=out.past_key_values,
        )
        parts.append(out.logits)
    assert largest_difference(unpadded(torch.cat(parts, 1), mask), unpadded(whole, mask)) <= 1e-5


@torch.no_grad()
def test_guidance_runs_without_audio_within_generate():
    """Forwards that others make within generate are theirs: the unconditional ones of guidance see the text only."""
    model, given = attached("llama", "prefix")
    first = model(**given).logits[:, -1].log_softmax(-1)
    without = model(given["input_ids"][:, -1:]).logits[:, -1].log_softmax(-1)
    got = model.generate(**given, max_new_tokens=1, do_sample=False, guidance_scale=1.5)
    assert torch.equal(got[:, -1], (without + 1.5 * (first - without)).argmax(-1))


@torch.no_grad()
def test_generation_from_embeddings():
    """Embeddings are the prompt also where ids come with them, to be continued."""
    model = build("llama")
    attach(model)
    _, ids, mask = batch(texts(), "none")
    options = {"audio": audio_state("inserted", torch.float32), "max_new_tokens": 4, "do_sample": False}
    want = model.generate(ids, **options)[:, -4:]
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), want)
    assert torch.equal(model.generate(input_ids=ids[:, :0], inputs_embeds=embedded, **options), want)
    assert torch.equal(model.generate(ids, inputs_embeds=embedded, attention_mask=mask, **options)[:, -4:], want)


def test_training_step_with_checkpointing_equals_without():
    gradients = []
    for checkpointing in ("off", "after attach", "before attach"):
        model = build("llama", torch.float64).train()
        if checkpointing == "after attach":
            attach(model)
        if checkpointing != "off":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        attach(model)
        _, padded, mask = batch(texts(), "right")
        state = audio_state("inserted", torch.float64)
        state.states.requires_grad_()
        labels = padded.masked_fill(mask == 0, -100)
        model(padded, attention_mask=mask, labels=labels, audio=state).loss.backward()
        gradients.append([state.states.grad, *(p.grad for p in model.parameters())])
    for plain, *others in zip(*gradients, strict=True):
        for checkpointed in others:
            torch.testing.assert_close(checkpointed, plain)


def test_report_names_layers_and_reasons():
    model = build("llama")
    handle = attach(model, LalConfig(layers=(1, 2)))
    report = handle.report()
    assert [layer.audio for layer in report.layers] == [False, True, True]
    assert [layer.impl for layer in report.layers] == ["stock", "sdpa", "sdpa"]
    assert str(report).splitlines() == [
        "LlamaForCausalLM, rope='sequence'",
        "layer  audio  implementation  audio_kv",
        "    0  no     stock           none",
        "    1  yes    sdpa            fused",
        "    2  yes    sdpa            fused",
    ]
    handle.detach()
    model.train()
    report = attach(model, LalConfig(impl="triton")).report()
    assert {(layer.impl, layer.why_not_triton) for layer in report.layers} == {("triton", ())}


def test_report_says_why_triton_does_not_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = attach(build("llama"), LalConfig(impl="triton")).report()
    assert {layer.impl for layer in report.layers} == {"none"}
    assert "CUDA device" in report.layers[0].why_not_triton[0]
    assert "triton does not run: tensors must be on a CUDA device" in str(report)


def test_attach_again():
    model = build("llama")
    handle = attach(model, LalConfig(layers=(0, 1)))
    assert attach(model, LalConfig(layers=[1, 0])) is handle
    with pytest.raises(ValueError, match="must be detached before another config"):
        attach(model, LalConfig())
    handle.detach()
    attach(model, LalConfig())


@torch.no_grad()
def test_two_models_and_a_copy_stay_apart():
    """Each attached model projects audio with its own weights, a deep copy included."""
    first = build("llama")
    _, padded, _ = batch(texts(), "none")
    state = audio_state("prefix", torch.float32)
    attach(first)
    second = copy.deepcopy(first)
    want = first(padded, audio=state).logits
    assert torch.equal(second(padded, audio=state).logits, want)
    second.model.layers[0].self_attn.k_proj.weight.zero_()
    assert not torch.equal(second(padded, audio=state).logits, want)
    assert torch.equal(first(padded, audio=state).logits, want)


def test_a_pickled_model_stays_attached(tmp_path):
    first = build("llama")
    _, padded, _ = batch(texts(), "none")
    state = audio_state("prefix", torch.float32)
    attach(first)
    torch.save(first, tmp_path / "model.pt")
    second = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(second(padded, audio=state).logits, first(padded, audio=state).logits)
        second._palkernels_handle.detach()
        assert not torch.equal(second(padded).logits, first(padded, audio=state).logits)


def test_compiled_model_has_the_eager_gradients():
    """Graph breaks are allowed, wrong gradients are not."""
    model = build("llama").train()
    _, padded, _ = batch(texts(), "none")
    attach(model)
    torch._dynamo.reset()
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        state = audio_state("prefix", torch.float32)
        state.states.requires_grad_()
        run(padded, audio=state, labels=padded).loss.backward()
        gradients.append(state.states.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gemma3", "phi3"])
@pytest.mark.parametrize("kind", ["prefix", "shared, inserted"])
@torch.no_grad()
def test_compiled_forward_is_one_graph(family, kind):
    model, given = attached(family, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = (run(**given, use_cache=False).logits for run in (compiled, model))
    mask = given["attention_mask"]
    torch.testing.assert_close(unpadded(got, mask), unpadded(want, mask))
    torch.testing.assert_close(compiled(given["input_ids"]).logits, model(given["input_ids"]).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_compiled_static_decode_is_one_graph(family):
    """Every step of generation, prefill included, in whole graphs; one graph serves all decoding steps."""
    model, given = attached(family, "shared, inserted")
    options = given | {"max_new_tokens": 8, "do_sample": False}
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


def test_save_pretrained_saves_a_stock_model(tmp_path):
    model = build("llama")
    attach(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    _, padded, _ = batch(texts(), "none")
    with torch.no_grad():
        assert torch.equal(again(padded).logits, model(padded).logits)


SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11))


def tiny(model_type, **changes):
    """A family that looks like ours and computes something else."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | changes)))


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


def layers_changed(change):
    model = build("llama")
    layers = model.model.layers
    if change == "reordered":
        model.model.layers = torch.nn.ModuleList([layers[0], layers[2], layers[1]])
    elif change == "dropped":
        model.model.layers = layers[1:]
    else:
        layers[1].self_attn = layers[0].self_attn
    return model


def other_attention(doubled):
    """A layer that doubles what its k_proj or v_proj makes, or keys that it has cached."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Cache:
        def __init__(self, cache):
            self.cache = cache

        def update(self, key, value, *args):
            key, value = self.cache.update(key, value, *args)
            return key * 2, value

    class Other(LlamaAttention):
        def forward(self, hidden_states, past_key_values=None, **kwargs):
            if doubled == "cached":
                return super().forward(hidden_states, past_key_values=Cache(past_key_values), **kwargs)
            hook = getattr(self, doubled).register_forward_hook(lambda module, args, out: out * 2)
            try:
                return super().forward(hidden_states, past_key_values=past_key_values, **kwargs)
            finally:
                hook.remove()

    Other.__module__ = LlamaAttention.__module__
    model = build("llama")
    model.model.layers[1].self_attn.__class__ = Other
    return model


def composed():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"model_type": "clip_vision_model", "image_size": 2, "patch_size": 1}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=build("llama").config))


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (gpt2, {}, "got GPT2LMHeadModel: its decoder has no layers"),
        (lambda: other_attention("k_proj"), {}, "got LlamaForCausalLM: its keys differ"),
        (lambda: other_attention("v_proj"), {}, "got LlamaForCausalLM: its values differ"),
        (lambda: other_attention("cached"), {}, "got LlamaForCausalLM: a layer changes its keys or values after"),
        (lambda: LlamaForSequenceClassification(build("llama").config), {}, "Classification: it is not a causal LM"),
        (composed, {}, "got LlavaForConditionalGeneration: it is composed of several models"),
        (lambda: tiny("stablelm"), {}, "got StableLmForCausalLM: its attention function cannot be chosen"),
        (lambda: tiny("nemotron"), {}, "got NemotronForCausalLM: .* keywords do not reach its attention function"),
        (lambda: tiny("llama", rope_parameters=SECTIONS), {}, "got LlamaForCausalLM: its positions have several dim"),
        (lambda: tiny("gemma3_text", use_bidirectional_attention=True), {}, "its attention is not causal"),
        (lambda: tiny("qwen2", layer_types=["chunked_attention"] * 3), {}, "layer 0 is of type 'chunked_attention'"),
        (lambda: tiny("gpt_oss"), {}, "got GptOssForCausalLM: its attention takes s_aux"),
        (lambda: tiny("diffllama"), {}, "got DiffLlamaForCausalLM: a layer calls its attention function 2 times"),
        (lambda: tiny("doge"), {}, "got DogeForCausalLM: a layer changes its attention mask"),
        (
            lambda: tiny("qwen2_moe", use_sliding_window=True, sliding_window=4, max_window_layers=1),
            {},
            "got Qwen2MoeForCausalLM: layer 0 is of type 'sliding_attention' and gives its attention sliding_win",
        ),
        (lambda: tiny("phi"), {}, "got PhiForCausalLM: a layer"),
        (lambda: tiny("olmo", clip_qkv=8.0), {}, "got OlmoForCausalLM: it clips its keys and values"),
        (lambda: layers_changed("reordered"), {}, "got LlamaForCausalLM: layer 1 has the attention of layer 2"),
        (lambda: layers_changed("dropped"), {}, "got LlamaForCausalLM: layer 0 has the attention of layer 1"),
        (lambda: layers_changed("shared"), {"layers": (0,)}, "layer 1 has the attention of layer 0"),
        (lambda: tiny("hunyuan_v1_dense", head_dim=16), {}, "got HunYuanDenseV1ForCausalLM: its keys differ"),
        (
            lambda: tiny("smollm3", no_rope_layers=[1, 0, 1], initializer_range=0.001).bfloat16(),
            {},
            "got SmolLM3ForCausalLM: its keys differ",
        ),
        (lambda: build("llama"), {"layers": (0, 3)}, r"layers must be from 0 to 2, got \(0, 3\)"),
    ],
    ids=[
        *("gpt2", "other keys", "other values", "changed keys", "classifier", "composed", "fixed attention"),
        *(
            "no keywords",
            "sections",
            "bidirectional",
            "chunks",
            "sinks",
            "two calls",
            "own mask",
            "own window",
            "dense",
        ),
        *("clipped", "reordered", "dropped", "shared", "norm after rope", "small, no rope", "layers"),
    ],
)
def test_refused_models(make, config, message):
    model = make()
    before = {name: value for name, value in model.__dict__.items() if name in ("forward", "generate")}
    with pytest.raises(ValueError, match=message):
        attach(model, LalConfig(**config))
    assert {name: value for name, value in model.__dict__.items() if name in ("forward", "generate")} == before
    assert not hasattr(model, "_palkernels_handle")


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
@torch.no_grad()
def test_weights_that_come_after_attach(family):
    """From the second forward with audio on as if they had been there, compiled too; compiling must wait for that."""
    empty, model = without_values(lambda: build(family))
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


@pytest.mark.parametrize("model_type", ["olmo", "nanochat"])
@torch.no_grad()
def test_norms_without_weights(model_type):
    """Accepted, through the modules."""
    model = tiny(model_type).eval()
    handle = attach(model)
    assert {layer.audio_kv for layer in handle.report().layers} == {"modules"}
    ids, state = texts()[0], AudioState(torch.randn(1, TOKENS, WIDTH))
    got = model(ids[None], audio=state).logits[0]
    handle.detach()
    row = rows_of([ids], (7,), state, 3)[0]
    assert float((got - oracle_logits(model, row, range(3), "sequence")).abs().max()) <= 1e-5


@torch.no_grad()
def test_small_weights_in_bfloat16_have_their_own_norm_offset():
    """Gemma multiplies by 1 + weight, which small keys must show, too."""
    model = tiny("gemma", initializer_range=0.002, head_dim=16).bfloat16().eval()
    handle = attach(model)
    assert {layer.audio_kv for layer in handle.report().layers} == {"fused"}
    state = AudioState(torch.randn(1, TOKENS, WIDTH).bfloat16())
    for name in ("k_proj", "v_proj"):
        for layer in model.model.layers:
            getattr(layer.self_attn, name).weight.mul_(100.0)
    fast = model(torch.tensor([[1, 2, 3]]), audio=state).logits
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *args: None)
    slow = model(torch.tensor([[1, 2, 3]]), audio=state).logits
    assert float((fast - slow).abs().max()) <= 0.02 * float(slow.abs().max())


@torch.no_grad()
def test_hooked_modules_are_honoured():
    """Projections are called as modules, so a hook or an adapter on them also acts on the audio."""
    model = build("llama")
    ids, padded, mask = batch(texts(), "left")
    state = audio_state("inserted", torch.float32)
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: out * 0.5)
    handle = attach(model)
    got = unpadded(model(padded, attention_mask=mask, audio=state).logits, mask)
    handle.detach()
    assert largest_difference(got, oracle_rows(model, "sequence", ids, state, "all")) <= 1e-5


def test_not_a_config():
    with pytest.raises(TypeError, match="config must be a LalConfig or a directory, got dict"):
        attach(build("llama"), {"layers": "all"})
    with pytest.raises(ValueError, match=r"all/lal.safetensors must be a file that handle.save wrote"):
        attach(build("llama"), "all")


def test_not_a_model():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "some"}, "layers must be"),
        ({"layers": (0, 0)}, "layers must be distinct integers"),
        ({"layers": (True,)}, "layers must be distinct integers"),
        ({"rope": "yes"}, "rope must be"),
        ({"impl": "flash"}, "impl must be one of"),
    ],
)
def test_invalid_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        LalConfig(**arguments)


class TestRefusedCalls:
    """Misuse that would otherwise be ignored, each with its own message."""

    @pytest.fixture
    def model(self):
        model = build("llama")
        attach(model)
        return model

    def state(self, **changes):
        return AudioState(**({"states": torch.zeros(3, TOKENS, WIDTH)} | changes))

    @pytest.mark.parametrize(
        ("states", "error", "message"),
        [
            (torch.zeros(3, TOKENS, WIDTH + 1), ValueError, "model's hidden size 64, got 65"),
            (
                torch.zeros(3, TOKENS, WIDTH).half(),
                TypeError,
                "model's dtype torch.float32, got torch.float16",
            ),
            (torch.zeros(2, TOKENS, WIDTH), ValueError, "audio must describe the batch's 3 text rows, got 2"),
            (torch.zeros(3, TOKENS, WIDTH, device="meta"), ValueError, "model's device cpu, got meta"),
            ([torch.zeros(3, TOKENS, WIDTH), None, None], ValueError, "a tensor exactly at layers"),
        ],
    )
    def test_states(self, model, states, error, message):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(error, match=message):
            model(padded, audio=AudioState(states))

    def test_not_a_state(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(TypeError, match="audio must be an AudioState, got Tensor"):
            model(padded, audio=torch.zeros(3, TOKENS, WIDTH))
        with pytest.raises(TypeError, match="audio must be an AudioState, got Tensor"):
            model.generate(padded, audio=torch.zeros(3, TOKENS, WIDTH))

    def test_masks(self, model):
        _, padded, mask = batch(texts(), "left")
        holes = torch.ones_like(mask)
        holes[1, 3] = 0
        with pytest.raises(ValueError, match="a mask with holes"):
            model(padded, attention_mask=holes, audio=self.state())
        with pytest.raises(ValueError, match=r"attention_mask must be 2-D with audio.*got \(3, 1, 9, 9\)"):
            model(padded, attention_mask=torch.ones(3, 1, 9, 9), audio=self.state())

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_right_padded_generate(self, model, chunk):
        """Also where the first chunk of the prompt has no padding yet."""
        _, padded, mask = batch(texts(), "right")
        options = {"audio": self.state(), "max_new_tokens": 2, "prefill_chunk_size": chunk}
        with pytest.raises(ValueError, match="without right padding"):
            model.generate(padded, attention_mask=mask, **options)
        mask[:, -1] = 1
        with pytest.raises(ValueError, match=r"a mask with holes|without right padding"):
            model.generate(padded, attention_mask=mask, **options)

    def test_rows_of_generate(self, model):
        _, padded, mask = batch(texts(), "left")
        with pytest.raises(ValueError, match="audio must describe the prompt's 3 rows, got 1"):
            model.generate(padded, attention_mask=mask, audio=AudioState(torch.zeros(1, TOKENS, WIDTH)))

    def test_insert_beyond_the_text(self, model):
        _, padded, mask = batch(texts(), "left")
        state = self.state(insert_at=torch.tensor([0, 5, 0]))  # the second text has 4 tokens
        with pytest.raises(ValueError, match="insert_at must be at most each text's length"):
            model.train()(padded, attention_mask=mask, audio=state)
        with pytest.raises(ValueError, match="insert_at must be at most each text's length"):
            model.eval().generate(padded, attention_mask=mask, audio=state, max_new_tokens=2)

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_insert_beyond_a_text_whose_mask_is_inferred(self, model, chunk):
        """Without a mask, generate takes padding tokens for padding."""
        _, padded, mask = batch(texts(), "left")
        options = {"max_new_tokens": 2, "do_sample": False, "prefill_chunk_size": chunk}
        for place in (4, 5):  # the second text has 4 tokens
            state = self.state(insert_at=torch.tensor([7, place, 9]))
            if place == 4:
                want = model.generate(padded, attention_mask=mask, audio=state, **options)
                assert torch.equal(model.generate(padded, audio=state, **options), want)
                assert model.generate(padded, audio=state, num_beams=2, **options).shape == want.shape
                continue
            with pytest.raises(ValueError, match="insert_at must be at most each text's length"):
                model.generate(padded, audio=state, **options)

    @pytest.mark.parametrize("bypass", ["prepares nothing", "drops the audio", "is put back", "is replaced"])
    def test_generate_that_does_not_prepare_with_audio(self, model, bypass):
        """Whoever takes attach's place in generate must not lose the audio silently."""
        _, padded, _ = batch(texts(), "none")
        options = {"max_new_tokens": 2, "do_sample": False}
        stock = model._palkernels_handle.stock("prepare_inputs_for_generation")
        ours = model.prepare_inputs_for_generation
        message = "generate must run what the attached model's prepare_inputs_for_generation returns"
        if bypass == "prepares nothing":
            options["custom_generate"] = lambda model, input_ids, **kwargs: model(input_ids).logits.argmax(-1)
        elif bypass == "drops the audio":

            def drop(*args, **kwargs):
                return {name: x for name, x in ours(*args, **kwargs).items() if name != "audio"}

            model.prepare_inputs_for_generation = drop
        elif bypass == "is put back":
            model.prepare_inputs_for_generation = type(model).prepare_inputs_for_generation.__get__(model)
            message = "prepare_inputs_for_generation must be the one that attach made, got the stock one"
        else:
            model.prepare_inputs_for_generation = lambda *args, **kwargs: stock(*args, **kwargs)
        with pytest.raises(RuntimeError, match=message):
            model.generate(padded, audio=self.state(), **options)
        model.prepare_inputs_for_generation = lambda *args, **kwargs: ours(*args, **kwargs)  # passes it on
        model.generate(padded, audio=self.state(), max_new_tokens=2, do_sample=False)

    def test_output_attentions(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="output_attentions must be off"):
            model(padded, audio=self.state(), output_attentions=True)
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions must be off"):
            model(padded, audio=self.state())

    def test_attention_dropout(self):
        model = build("llama")
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        attach(model)
        _, padded, _ = batch(texts(), "none")
        model(padded, audio=self.state())
        with pytest.raises(ValueError, match="attention_dropout must be 0 in training"):
            model.train()(padded, audio=self.state())

    def test_dropout_that_only_the_layers_apply(self, model):
        _, padded, _ = batch(texts(), "none")
        model.model.layers[0].self_attn.attention_dropout = 0.5
        model.model.layers[0].train()
        with pytest.raises(ValueError, match=r"attention dropout must be 0 with audio.*got 0.5"):
            model(padded, audio=self.state())

    def test_audio_to_the_inner_model(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="audio must be given to the attached causal LM itself"):
            model.model(padded, audio=self.state())

    def test_bidirectional_attention(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="is_causal must not be given with audio"):
            model(padded, audio=self.state(), is_causal=False)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            with pytest.raises(ValueError, match=f"{name} must not be given with audio"):
                model(padded, audio=self.state(), **{name: torch.tensor([0, 1])})

    def test_arguments_that_do_not_fit(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(TypeError, match="got input_ids twice"):
            model(padded, input_ids=padded, audio=self.state())
        with pytest.raises(TypeError, match="positional arguments, got 20"):
            model(padded, *[None] * 19, audio=self.state())
        with pytest.raises(ValueError, match="input_ids or inputs_embeds, got neither"):
            model(audio=self.state())
        with pytest.raises(ValueError, match=r"texts \(B, T\), B and T >= 1, got shape \(9,\)"):
            model(padded[0], audio=self.state())
        with pytest.raises(ValueError, match=r"texts \(B, T\), B and T >= 1, got shape \(0, 9\)"):
            model(padded[:0], audio=AudioState(torch.zeros(0, TOKENS, WIDTH)))
        with pytest.raises(ValueError, match=r"position_ids must count.*got list"):
            model(padded, position_ids=[0], audio=self.state())

    def test_early_exit(self, model):
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="assistant_early_exit must be None with audio"):
            model.generate(padded[:1], audio=self.state(states=torch.zeros(1, 1, WIDTH)), assistant_early_exit=1)

    def test_a_prompt_of_padding(self, model):
        _, padded, mask = batch(texts(), "left")
        mask[1] = 0
        with pytest.raises(ValueError, match="every row of a prompt with audio must hold a token"):
            model.generate(padded, attention_mask=mask, audio=self.state(), max_new_tokens=2)

    def test_a_layer_that_does_not_take_the_audio(self, model):
        """Somebody swaps a layer's attention function after attach: counted, not ignored."""
        attention = model.model.layers[1].self_attn
        attention.config = attention.config._palkernels_stock_config
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(RuntimeError, match=r"layers \[1\] did not"):
            model(padded, audio=self.state())

    def test_reentrant_checkpointing(self, model):
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        _, padded, _ = batch(texts(), "none")
        with pytest.raises(ValueError, match="gradient checkpointing must be non-reentrant with audio"):
            model(padded, audio=self.state())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"states": []}, ValueError, "states must hold at least one tensor"),
        ({"states": 3}, TypeError, "states must be a tensor or a list of them, got int"),
        ({"states": torch.zeros(2, 3)}, ValueError, r"states must be \(A, N, d\)"),
        (
            {"states": torch.zeros(2, 3, 4).int()},
            TypeError,
            "states must be floating-point tensors, got torch.int32",
        ),
        ({"states": [torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)]}, ValueError, "of one shape in all layers"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths must be \(A,\) = \(2,\)"),
        (
            {"lengths": torch.tensor([1, 4])},
            ValueError,
            "lengths must be from 0 to 3, got values from 1 to 4",
        ),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths must have an integer dtype"),
        ({"lengths": [1, 2]}, TypeError, "lengths must be a tensor, got list"),
        ({"index": torch.tensor([2])}, ValueError, "index must be from 0 to 1, got values from 2 to 2"),
        ({"index": torch.tensor([[0]])}, ValueError, r"index must be \(B,\)"),
        ({"insert_at": torch.tensor([-1, 0])}, ValueError, "insert_at must be at least 0"),
        ({"insert_at": torch.tensor([0])}, ValueError, "insert_at must have a row per text row = 2"),
        (
            {"insert_at": torch.zeros(2, 4).long()},
            ValueError,
            r"insert_at must be \(B,\) or \(B, N\) with N = 3",
        ),
        ({"insert_at": torch.tensor([[1, 0, 2]] * 2)}, ValueError, "insert_at must not decrease"),
        ({"insert_at": torch.tensor([[5, 1, 0]] * 2).to(torch.uint8)}, ValueError, "insert_at must not decrease"),
        ({"lengths": torch.tensor([1, 9]).to(torch.uint16)}, ValueError, "lengths must be from 0 to 3"),
    ],
)
def test_invalid_state(fields, error, message):
    with pytest.raises(error, match=message):
        AudioState(**({"states": torch.zeros(2, 3, 4)} | fields))
