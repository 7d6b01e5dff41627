"""Masks with holes, as a batched second turn makes them: each row as it is alone, without padding."""

import pytest
import torch
from support.oracles import build
from transformers import DynamicCache, StaticCache

from palkernels.model import AudioState, LalConfig, attach, attach_flamingo

# By row, the tokens of the turns; each turn is padded on the left to the longest one.
TURNS = ((3, 4, 1), (5, 2, 2), (2, 1, 3))
MASK = torch.cat(
    [torch.stack([torch.arange(max(turn)) >= max(turn) - n for n in turn]) for turn in zip(*TURNS, strict=True)], dim=1
).long()
IDS = torch.randint(1, 101, MASK.shape, generator=torch.Generator().manual_seed(0))
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def audio(rows=slice(None), dtype=torch.float64):
    states = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    places = torch.tensor([[1, 1, 4, 4, 4, 8], [0, 2, 2, 6, 6, 6], [0, 0, 0, 0, 0, 0]])
    return AudioState(states[rows], torch.tensor([6, 4, 0])[rows], insert_at=places[rows])


def alone(run):
    """``run`` on each row's own tokens and audio."""
    return [run(IDS[i : i + 1, MASK[i].bool()], audio(slice(i, i + 1))) for i in range(3)]


def attached(family, method="lal", **settings):
    model = build(family, torch.float64)
    if method == "lal":
        attach(model, LalConfig(**settings))
        return model
    for layer in attach_flamingo(model, 1).layers.values():  # gates begin at 0, where no audio passes
        layer.attention_gate.data.fill_(0.7)
        layer.ffn_gate.data.fill_(-0.4)
    return model


CASES = [
    *((family, "lal", rope) for family in ("llama", "gemma2", "mistral-window") for rope in ("sequence", "none")),
    ("phi3", "lal", "sequence"),
    ("llama", "flamingo", None),
]


@pytest.mark.parametrize(("family", "method", "rope"), CASES)
def test_logits_and_gradients(family, method, rope):
    """What padding holds changes nothing; windows count tokens."""
    model = attached(family, method, **({} if rope is None else {"rope": rope}))
    weights = torch.randn(*MASK.shape, 101, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    together = model(IDS, attention_mask=MASK, audio=audio(), use_cache=False).logits[MASK.bool()]
    (together * weights[MASK.bool()]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    want = torch.cat([x[0] for x in alone(lambda ids, state: model(ids, audio=state, use_cache=False).logits)])
    (want * weights[MASK.bool()]).sum().backward()
    assert float((together - want).detach().abs().max()) <= 1e-10
    for name, parameter in model.named_parameters():
        assert float((gradients[name] - parameter.grad).abs().max()) <= 1e-5, name  # norms compute in float32
    other = IDS.masked_fill(MASK == 0, 7)
    with torch.no_grad():
        again = model(other, attention_mask=MASK, audio=audio(), use_cache=False).logits[MASK.bool()]
    assert torch.equal(again, together)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@torch.no_grad()
def test_other_implementations(impl):
    model = attached("llama", impl=impl)
    got = model(IDS, attention_mask=MASK, audio=audio()).logits
    want = alone(lambda ids, state: attached("llama")(ids, audio=state).logits[0])
    for row, mask, expected in zip(got, MASK.bool(), want, strict=True):
        assert float((row[mask] - expected).abs().max()) <= 1e-10


@pytest.mark.parametrize("method", ["lal", "flamingo"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
@torch.no_grad()
def test_generate(method, options):
    model = attached("llama", method)
    got = model.generate(IDS, attention_mask=MASK, audio=audio(), **OPTIONS, **options)[:, -5:]
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    want = alone(lambda ids, state: model.generate(ids, audio=state, **OPTIONS, **beams)[:, -5:])
    assert torch.equal(got, torch.cat(want))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_turns_in_a_cache(cache):
    """Turn by turn, the cache keeping the padding of each; the last one's logits, and what generate goes on with."""
    model = attached("llama")
    kept = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=24)
    end = 0
    for turn in zip(*TURNS, strict=True):
        begin, end = end, end + max(turn)
        mask = MASK[:, :end]
        # Texts are not whole yet, so that audio may stand behind them.
        logits = model(IDS[:, begin:end], attention_mask=mask, past_key_values=kept, audio=audio()).logits
    want = alone(lambda ids, state: model(ids, audio=state).logits[0])
    for row, expected, count in zip(logits, want, turn, strict=True):
        assert float((row[-count:] - expected[-count:]).abs().max()) <= 1e-10
    if cache == "static":
        return
    kept.crop(-1)
    tokens = model.generate(IDS, attention_mask=MASK, past_key_values=kept, audio=audio(), **OPTIONS)[:, -5:]
    assert torch.equal(tokens, torch.cat(alone(lambda ids, state: model.generate(ids, audio=state, **OPTIONS)[:, -5:])))


@torch.no_grad()
def test_positions_count_tokens():
    model = attached("llama")
    want = model(IDS, attention_mask=MASK, audio=audio()).logits
    own = (MASK.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model(IDS, attention_mask=MASK, position_ids=own, audio=audio()).logits, want)
    columns = torch.arange(MASK.shape[1]).expand_as(MASK)
    with pytest.raises(ValueError, match="position_ids must count each row's own text from 0"):
        model(IDS, attention_mask=MASK, position_ids=columns, audio=audio())


def test_where_windows_would_count_padding():
    model = attached("mistral-window")
    message = "attention_mask must mark one run of tokens per row where layers have sliding windows"
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, attention_mask=MASK, audio=audio(), **OPTIONS)
    with pytest.raises(ValueError, match=message):
        attached("mistral-window", layers=(0, 1))(IDS, attention_mask=MASK, audio=audio())
    with pytest.raises(ValueError, match=message):
        attached("mistral-window", "flamingo")(IDS, attention_mask=MASK, audio=audio())
    with pytest.raises(ValueError, match="one run of tokens per row where a prompt with audio comes in chunks"):
        attached("llama").generate(IDS, attention_mask=MASK, audio=audio(), **OPTIONS, prefill_chunk_size=6)
