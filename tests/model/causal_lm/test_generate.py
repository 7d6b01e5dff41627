"""generate with audio: the tokens of the uncached oracle, whichever way they are searched for."""

import copy

import pytest
import torch
from support.attached import (
    LENGTHS,
    TOKENS,
    WIDTH,
    attached,
    audio_state,
    batch,
    texts,
)
from support.oracles import FAMILIES, build, oracle_logits, rows_of
from support.thorough import combinations

from palkernels.model import AudioState, LalConfig, attach


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


@pytest.mark.parametrize(
    ("family", "rope", "kind"),
    combinations(FAMILIES, ["sequence", "none"], ["prefix", "two clips", "shared, inserted"]),
)
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


@torch.no_grad()
def test_guidance_runs_without_audio_within_generate():
    """Forwards that others make within generate are theirs: the unconditional ones of guidance see the text only."""
    model, keywords = attached("llama", "prefix")
    first = model(**keywords).logits[:, -1].log_softmax(-1)
    without = model(keywords["input_ids"][:, -1:]).logits[:, -1].log_softmax(-1)
    got = model.generate(**keywords, max_new_tokens=1, do_sample=False, guidance_scale=1.5)
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
        # Once for each of three layers, the valid tokens of both clips; the other calls are the text's.
        assert [shape for shape in calls if shape[0] == 1] == [(1, 6 + 2)] * 3


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
