"""RoPE whose frequencies depend on the longest position: audio and text share them."""

import copy

import pytest
import torch
from support.attached import (
    WIDTH,
    texts,
)
from support.oracles import LENGTH_DEPENDENT, build, oracle_logits, rows_of

from palkernels.model import AudioState, LalConfig, attach


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


@pytest.mark.parametrize("tokens", [2, 5, 6])
@torch.no_grad()
def test_generation_across_the_change(tokens):
    """Text and audio together pass the change while tokens are generated, before or after the text alone does: all keys
    then get the other frequencies, as in whole forwards."""
    model = build("phi3-longrope", torch.float64)
    ids = texts()[0].repeat(2)[:5][None]
    generator = torch.Generator().manual_seed(tokens)
    state = AudioState(
        torch.randn(1, tokens, WIDTH, dtype=torch.float64, generator=generator), insert_at=torch.tensor([2])
    )
    row, stock = rows_of(ids, (5,), state, 3)[0], copy.deepcopy(model)
    for _ in range(10):
        row.ids = torch.cat([row.ids, oracle_logits(stock, row, range(3), "sequence")[-1].argmax().view(1)])
    attach(model)
    options = {"audio": state, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options)[0], row.ids)
    with pytest.raises(ValueError, match="input_ids must be the whole text where RoPE changes, behind 12 positions"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
