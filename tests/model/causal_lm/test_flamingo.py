"""Flamingo's gated layers: the stock model while gates are 0, and a layer written by hand where they are not."""

import copy

import pytest
import torch
from support.oracles import build
from torch.nn.functional import layer_norm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from palkernels.model import AudioState, LalConfig, attach
from palkernels.model.causal_lm.flamingo import attach_flamingo

LENGTHS, TOKENS, WIDTH = (7, 4, 9), 6, 64
FAMILIES = ("llama", "qwen3", "gemma3", "phi3-window")
# lengths, index and insert_at of the audio; text rows 0, 1 and 2 have 7, 4 and 9 tokens
KINDS = {
    "prefix": {},
    "lengths": {"lengths": [6, 0, 3]},
    "inserted": {"lengths": [4, 6, 5], "insert_at": [3, 4, 0]},
    "two clips": {
        "lengths": [6, 5, 6],
        "insert_at": [[1, 1, 1, 5, 5, 5], [0, 0, 2, 2, 2, 2], [9, 9, 9, 9, 9, 9]],
    },
    "shared": {"lengths": [6, 2], "index": [1, 0, 0], "insert_at": [2, 4, 1]},
    "none": {"lengths": [0, 0, 0]},
}


def audio(kind, dtype=torch.float64):
    fields = {name: torch.tensor(value) for name, value in KINDS[kind].items()}
    generator = torch.Generator().manual_seed(5)
    rows = 2 if kind == "shared" else 3
    states = torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return AudioState(states.to(dtype), **fields)


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 101, (n,), generator=generator) for n in LENGTHS]


def batch(side):
    rows, masks = [], []
    for row in texts():
        gap = max(LENGTHS) - len(row)
        pad = (gap, 0) if side == "left" else (0, gap)
        rows.append(torch.nn.functional.pad(row, pad))
        masks.append(torch.nn.functional.pad(torch.ones_like(row), pad))
    return torch.stack(rows), torch.stack(masks)


def positions(mask):
    """Of each row's own text. RoPE's angles are float32: from the batch's positions they differ by 1e-7."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def open_gates(handle, seed=3):
    """Gates and norms that are not what they begin with."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in handle.layers.named_parameters():
        if "gate" in name:
            parameter.data.copy_(torch.rand(1, generator=generator) + 0.5)
        elif "norm" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def attached(family="llama", every=2, dtype=torch.float64, **settings):
    model = build(family, dtype)
    torch.manual_seed(7)
    handle = attach_flamingo(model, every, **settings)
    open_gates(handle)
    return model, handle


def by_hand(stock, layers, ids, states, insert_at):
    """Logits (T, V) of one unpadded row, every new layer written out query by query."""

    def before(new):
        weights = {name: p.detach() for name, p in new.named_parameters()}

        def norm(name, x):
            return layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

        def hook(module, args):
            rows = []
            for t, y in enumerate(args[0][0]):
                seen = states[insert_at <= t]
                if len(seen):
                    query = (norm("attention_norm", y) @ weights["q_proj.weight"].T).view(-1, new.head_dim)
                    keys = (seen @ weights["k_proj.weight"].T).view(len(seen), -1, new.head_dim)
                    values = (seen @ weights["v_proj.weight"].T).view(len(seen), -1, new.head_dim)
                    heads = []
                    for h in range(len(query)):
                        share = (keys[:, h] @ query[h] / new.head_dim**0.5).softmax(dim=0)
                        heads.append(share @ values[:, h])
                    y = y + weights["attention_gate"].tanh() * (weights["o_proj.weight"] @ torch.cat(heads))
                    wide = (weights["up_proj.weight"] @ norm("ffn_norm", y)).relu().square()
                    y = y + weights["ffn_gate"].tanh() * (weights["down_proj.weight"] @ wide)
                rows.append(y)
            return (torch.stack(rows)[None], *args[1:])

        return hook

    hooks = [stock.model.layers[int(i)].register_forward_pre_hook(before(new)) for i, new in layers.items()]
    try:
        return stock(ids[None], use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(state):
    """Each text row's valid audio (n, d) and where it stands (n,)."""
    found = []
    for b in range(3):
        a = b if state.index is None else int(state.index[b])
        n = TOKENS if state.lengths is None else int(state.lengths[a])
        at = torch.zeros(n, dtype=torch.long)
        if state.insert_at is not None:
            at = state.insert_at[b].reshape(-1).expand(TOKENS)[:n]
        found.append((state.states[a, :n], at))
    return found


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_against_a_layer_written_by_hand(kind):
    """Left- and right-padded: float64 within 1e-9 of one unpadded row at a time."""
    model, handle = attached("llama", every=2)
    stock = build("llama", torch.float64)
    want = [
        by_hand(stock, handle.layers, ids, *of_row) for ids, of_row in zip(texts(), rows_of(audio(kind)), strict=True)
    ]
    for side in ("left", "right"):
        ids, mask = batch(side)
        logits = model(ids, attention_mask=mask, position_ids=positions(mask), audio=audio(kind)).logits
        for got, keep, wanted in zip(logits, mask.bool(), want, strict=True):
            torch.testing.assert_close(got[keep], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_and_setting(family):
    """Other models' layers, other heads than the model's, a layer before each: as by hand."""
    model, handle = attached(family, every=1, heads=3, head_dim=8, ffn_multiplier=2)
    stock = build(family, torch.float64)
    assert [tuple(x.q_proj.weight.shape) for x in handle.layers.values()] == [(24, WIDTH)] * 3
    assert handle.layers["0"].up_proj.weight.shape == (2 * WIDTH, WIDTH)
    ids, state = texts()[0][None], AudioState(torch.randn(1, TOKENS, WIDTH).double(), insert_at=torch.tensor([2]))
    want = by_hand(stock, handle.layers, ids[0], state.states[0], torch.full((TOKENS,), 2))
    torch.testing.assert_close(model(ids, audio=state).logits[0], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_closed_gates_are_the_stock_model(family):
    """As attached, to the bit: forward with and without a mask, and greedy generation."""
    stock, model = build(family), build(family)
    handle = attach_flamingo(model, 1)
    ids, mask = batch("left")
    state = audio("inserted", torch.float32)
    assert torch.equal(model(ids, audio=state).logits, stock(ids).logits)
    assert torch.equal(model(ids, attention_mask=mask, audio=state).logits, stock(ids, attention_mask=mask).logits)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, audio=state, **settings), stock.generate(ids, **settings))
    open_gates(handle)
    assert not torch.equal(model(ids, attention_mask=mask, audio=state).logits, stock(ids, attention_mask=mask).logits)
    assert torch.equal(model(ids).logits, stock(ids).logits)  # no audio, no new layers


@torch.no_grad()
def test_what_sees_no_audio_is_the_stock_models():
    """Text before the audio and rows without any, whatever the gates; there may be no audio at all."""
    model, _ = attached()
    ids, mask = batch("left")
    want = build("llama", torch.float64)(ids, attention_mask=mask).logits
    got = model(ids, attention_mask=mask, audio=audio("inserted")).logits
    torch.testing.assert_close(got[0, 2:5], want[0, 2:5])  # three tokens before the clip
    torch.testing.assert_close(got[1, 5:], want[1, 5:])  # the clip stands behind the prompt
    assert (got[0, 5:] - want[0, 5:]).abs().amax(dim=-1).min() > 1e-3
    for state in (audio("none"), AudioState(torch.zeros(3, 0, WIDTH).double())):
        torch.testing.assert_close(model(ids, attention_mask=mask, audio=state).logits[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation(kind):
    """Cached steps give the tokens of forwards over the whole text; each layer projects the audio once a call."""
    model, handle = attached(every=1)
    ids, mask = batch("left")
    calls = []
    handle.layers["0"].k_proj.register_forward_hook(lambda *_: calls.append(1))
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    found = model.generate(ids, audio=audio(kind), **settings)
    assert len(calls) == 1
    assert torch.equal(model.generate(ids, audio=audio(kind), use_cache=False, **settings), found)
    for _ in range(5):
        step = model(ids, attention_mask=mask, audio=audio(kind)).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids, mask = torch.cat([ids, step], dim=1), torch.cat([mask, torch.ones_like(step)], dim=1)
    assert torch.equal(found, ids)


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text():
    """A forward that continues a cache sees the audio from where it stands; so does one with a static cache."""
    model, _ = attached(every=1)
    ids, mask = batch("left")
    state, places = audio("two clips"), positions(mask)
    want = model(ids, attention_mask=mask, position_ids=places, audio=state).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        for first, last in ((0, 6), (6, 7), (7, 9)):
            step = model(
                ids[:, first:last],
                attention_mask=mask[:, :last],
                position_ids=places[:, first:last],
                past_key_values=cache,
                audio=state,
            )
            valid = mask[:, first:last].bool()
            torch.testing.assert_close(step.logits[valid], want[:, first:last][valid])


@torch.no_grad()
def test_beams_share_the_audio():
    """Each beam of a row reads that row's audio: the same sequences as one row at a time."""
    model, _ = attached()
    ids, mask = batch("left")
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, audio=audio("lengths"), **settings)
    for row, (states, _) in enumerate(rows_of(audio("lengths"))):
        alone = model.generate(texts()[row][None], audio=AudioState(states[None]), **settings)
        assert torch.equal(alone[0, -4:], found[row, -4:])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(checkpointed):
    """They reach gates, projections, norms, the audio and the model; checkpointing changes none of them."""
    found = []
    for on in (False, checkpointed):
        model, handle = attached(every=1)
        model.train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        state = audio("inserted")
        state.states.requires_grad_()
        ids, mask = batch("left")
        kept = []
        handle.layers["1"].up_proj.register_forward_hook(lambda *_, kept=kept: kept.append(1))
        model(ids, attention_mask=mask, labels=ids, audio=state).loss.backward()
        assert len(kept) == 1 + on  # its activations are made again where they are not kept
        parameters = {**dict(handle.layers.named_parameters()), **dict(model.named_parameters())}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
        assert (state.states.grad[0, :4].abs().sum(dim=-1) > 0).all()
        assert (state.states.grad[0, 4:] == 0).all()
        found.append({name: p.grad for name, p in parameters.items()} | {"states": state.states.grad})
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["prefix", "two clips", "shared"])
def test_triton_kernels(kind):
    """Logits and gradients by the kernels are those of the portable path."""
    found = []
    for impl in ("sdpa", "triton"):
        model, handle = attached(every=2, dtype=torch.float32, impl=impl)
        state = audio(kind, torch.float32)
        state.states.requires_grad_()
        ids, mask = batch("left")
        out = model(ids, attention_mask=mask, labels=ids, audio=state)
        out.loss.backward()
        grads = {name: p.grad for name, p in handle.layers.named_parameters()} | {"states": state.states.grad}
        found.append(grads | {"logits": out.logits})
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_closed_gates_learn():
    """At the start the gates alone have gradients of the new parameters, so that they open."""
    model = build("llama", torch.float64).train()
    handle = attach_flamingo(model, 2)
    ids, mask = batch("left")
    model(ids, attention_mask=mask, labels=ids, audio=audio("prefix")).loss.backward()
    moved = {name for name, p in handle.layers.named_parameters() if p.grad.abs().sum() > 0}
    assert moved == {"1.attention_gate", "1.ffn_gate"}


@torch.no_grad()
def test_states_per_layer():
    """One entry per model layer, a tensor where a new layer stands."""
    model, _ = attached(every=2)
    ids, mask = batch("left")
    one = audio("prefix").states
    want = model(ids, attention_mask=mask, audio=AudioState(one)).logits
    assert torch.equal(model(ids, attention_mask=mask, audio=AudioState([None, one, None])).logits, want)
    with pytest.raises(ValueError, match=r"a tensor exactly at layers \[1\], got 3 entries with tensors at \[0, 1\]"):
        model(ids, attention_mask=mask, audio=AudioState([one, one, None]))


@torch.no_grad()
def test_detach_and_save(tmp_path):
    """save_pretrained and detach leave a stock model; the new layers' state_dict goes into another attached one."""
    model, handle = attached(dtype=torch.float32)
    ids, mask = batch("left")
    state = audio("inserted", torch.float32)
    want = model(ids, attention_mask=mask, audio=state).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is LlamaForCausalLM
    other = attach_flamingo(again, 2)
    other.layers.load_state_dict(handle.layers.state_dict())
    torch.testing.assert_close(again(ids, attention_mask=mask, audio=state).logits, want)
    handle.detach()
    handle.detach()
    stock = build("llama")
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert set(model.__dict__) == set(stock.__dict__)
    attach(model).detach()


@torch.no_grad()
def test_copies_are_attached_models():
    """A deep copy has new layers of its own, and can be detached by itself."""
    model, _ = attached()
    ids, mask = batch("left")
    want = model(ids, attention_mask=mask, audio=audio("prefix")).logits
    other = copy.deepcopy(model)
    handle = other._palkernels_handle
    assert torch.equal(other(ids, attention_mask=mask, audio=audio("prefix")).logits, want)
    handle.layers["1"].ffn_gate.zero_()
    handle.detach()
    assert torch.equal(other(ids).logits, build("llama", torch.float64)(ids).logits)
    assert torch.equal(model(ids, attention_mask=mask, audio=audio("prefix")).logits, want)


def test_new_layers_follow_the_model():
    """Its dtype and device, its heads by default, trainable; none of them among its own parameters."""
    model = build("qwen3", torch.bfloat16)
    before = set(model.state_dict())
    handle = attach_flamingo(model, 3)
    assert list(handle.layers) == ["2"]
    assert handle.selected == (2,)
    assert (handle.config.heads, handle.config.head_dim, handle.config.ffn_multiplier) == (4, 24, 4)
    assert {p.dtype for p in handle.layers.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in handle.layers.parameters())
    assert set(model.state_dict()) == before
    empty = attach_flamingo(build("llama").to("meta"), 1)
    assert {p.device.type for p in empty.layers.parameters()} == {"meta"}


def test_two_attaches_are_refused():
    model = build("llama")
    attach_flamingo(model, 3)
    for again in (lambda: attach_flamingo(model, 3), lambda: attach(model), lambda: attach(model, LalConfig())):
        with pytest.raises(ValueError, match="the model must be detached before"):
            again()
    model._palkernels_handle.detach()
    attach(model)
    with pytest.raises(ValueError, match="the model must be detached before it is attached again, got a LalHandle's"):
        attach_flamingo(model, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 4}, "every must be at most the model's 3 layers, got 4"),
        ({"every": 0}, "every must be a positive integer, got 0"),
        ({"heads": 0}, "heads must be a positive integer, got 0"),
        ({"activation": "step"}, "activation must be one that transformers knows, got 'step'"),
        ({"impl": "fast"}, "impl must be one of .*, got 'fast'"),
    ],
)
def test_refuses_settings(settings, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        attach_flamingo(model, **({"every": 1} | settings))
    assert not hasattr(model, "_palkernels_handle")
    assert not model.model.layers[0]._forward_pre_hooks


def test_refuses_inputs():
    """What LAL refuses of audio is refused here in the same words."""
    model, _ = attached(every=1, dtype=torch.float32)
    ids, mask = batch("left")
    with pytest.raises(TypeError, match=r"audio states must have the model's dtype torch.float32, got torch.float64"):
        model(ids, audio=audio("prefix"))
    with pytest.raises(TypeError, match="audio must be an AudioState, got Tensor"):
        model(ids, audio=audio("prefix").states)
    behind = AudioState(audio("prefix", torch.float32).states, insert_at=torch.tensor([0, 5, 0]))
    with pytest.raises(ValueError, match=r"insert_at must be at most each text's length \[7, 4, 9\]"):
        model(ids, attention_mask=mask, use_cache=False, audio=behind)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient checkpointing must be non-reentrant with audio"):
        model(ids, audio=audio("prefix", torch.float32))
