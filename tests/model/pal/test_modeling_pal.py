"""A whole audio LLM against stock models on the concatenated sequence, against the oracle, and against its own rows."""

import pytest
import torch
from support.audio_llm import AUDIO_ID, AUDIO_TOKEN, LAYERS, build_pal, entry, open_gates, processor_of, tone
from support.oracles import Row, oracle_logits
from transformers import StaticCache

from palkernels.model import AudioFeatures
from palkernels.model.pal.clips import Clips

# transformers computes norms in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TEXTS = [f"hear {AUDIO_TOKEN}: what?", f"{AUDIO_TOKEN} or {AUDIO_TOKEN}, then", "no sound"]


def clips():
    return [tone(), tone(300, 0.04), tone(700, 0.07)]


def batch_of(model, texts=TEXTS, audio=None, **settings):
    return dict(processor_of(model)(texts, clips() if audio is None else audio, 16_000, **settings))


def encoded(model, batch, entry_index=0):
    """Each clip's states after its connector, without padding."""
    features = batch["input_features"]
    features = features if isinstance(features, list) else [features]
    states = model.audio_tower[entry_index](features[entry_index])
    out, valid = model.multi_modal_projector[entry_index].connect(states, batch["audio_lengths"][:, entry_index])
    return [row[:n] for row, n in zip(out, valid.tolist(), strict=True)]


def row_of(batch, b):
    """A row's ids without padding, its clips, and where each stands."""
    ids = batch["input_ids"][b][batch["attention_mask"][b] != 0]
    heard = [(clip, place) for clip, place in zip(batch["audio_index"][b].tolist(), batch["insert_at"][b].tolist(),
                                                  strict=True) if clip >= 0]  # fmt: skip
    return ids, heard


def embeds_of(model, ids, tokens):
    """The text's embeddings, placeholders replaced by ``tokens`` in their order."""
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == AUDIO_ID] = tokens
    return embeds


def joined(parts, width=64):
    return torch.cat(parts) if parts else torch.zeros(0, width, dtype=torch.float64)


@torch.no_grad()
def check_against_oracle(model, lal=None, plits=None, layers=None):
    """``lal`` and ``plits`` are lists of each clip's tokens."""
    batch = batch_of(model)
    got = model(**batch).logits
    state = lal(batch) if lal else None
    tokens = plits(batch) if plits else None
    for b in range(len(TEXTS)):
        ids, heard = row_of(batch, b)
        own = joined([state[clip] for clip, _ in heard] if state else [])
        insert_at = [torch.full((len(state[clip]),), place) for clip, place in heard] if state else []
        insert_at = torch.cat(insert_at) if insert_at else torch.zeros(0, dtype=torch.long)
        embeds = embeds_of(model, ids, joined([tokens[clip] for clip, _ in heard])) if tokens else None
        row = Row(ids, [own] * LAYERS, insert_at, embeds)
        language_model = model.language_model
        implementation = language_model.config._attn_implementation
        want = oracle_logits(language_model, row, layers or [], "sequence")
        language_model.set_attn_implementation(implementation)
        valid = batch["attention_mask"][b] != 0
        torch.testing.assert_close(got[b][valid], want, **CLOSE)


@pytest.mark.parametrize("kind", ["whisper", "clap"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_plits_is_the_stock_model_on_concatenated_embeddings(kind, family):
    model = build_pal(entry(kind, "plits"), family=family)
    batch = batch_of(model)
    with torch.no_grad():
        got, tokens = model(**batch).logits, encoded(model, batch)
        order = [clip for own in batch["audio_index"].tolist() for clip in own if clip >= 0]
        embeds = embeds_of(model, batch["input_ids"], torch.cat([tokens[clip] for clip in order]))
        want = model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(got, want)


def test_lal_in_no_layer_is_the_text_alone():
    model = build_pal(entry("sslam"), layers=[])
    batch = batch_of(model)
    with torch.no_grad():
        want = model.language_model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(model(**batch).logits, want)


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", [0, 1, 2]), ("llama", [1, 2]), ("gemma3", [2]), ("qwen3", [0])]
)
def test_lal_is_the_oracle(family, layers):
    model = build_pal(entry("whisper"), family=family, dtype=torch.float64, layers=layers)
    check_against_oracle(model, lal=lambda batch: encoded(model, batch), layers=layers)


def test_several_encoders_by_plits_and_lal_in_one_sequence():
    """Whisper by PLITS, SSLAM and CLAP by LAL at the same place, in the order of the config."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), entry("clap"), dtype=torch.float64, layers=[0, 2])

    def lal(batch):
        return [torch.cat(pair) for pair in zip(encoded(model, batch, 1), encoded(model, batch, 2), strict=True)]

    check_against_oracle(model, lal=lal, plits=lambda batch: encoded(model, batch), layers=[0, 2])


def summaries(tokens, count):
    return [torch.nn.functional.adaptive_avg_pool1d(x.T[None], count)[0].T for x in tokens]


@pytest.mark.parametrize("layers", [[], [1, 2]])
def test_summary_tokens(layers):
    """Few tokens by PLITS, all by LAL; with no layer for LAL it is PLITS of the few."""
    model = build_pal(entry("whisper"), dtype=torch.float64, layers=layers, summary_tokens=3)
    check_against_oracle(
        model,
        lal=(lambda batch: encoded(model, batch)) if layers else None,
        plits=lambda batch: summaries(encoded(model, batch), 3),
        layers=layers,
    )


@pytest.mark.parametrize("integration", ["lal", "plits"])
def test_lfst_joins_two_encoders(integration):
    model = build_pal(entry(["sslam", "clap"], integration, "lfst"))
    batch = batch_of(model, [f"{AUDIO_TOKEN}?"], [tone(seconds=0.2)])
    with torch.no_grad():
        pair = tuple(tower(x) for tower, x in zip(model.audio_tower, batch["input_features"], strict=True))
        assert batch["audio_lengths"].tolist() == [[16, 2]]
        out, valid = model.multi_modal_projector[0].connect(pair, batch["audio_lengths"][:, 0])
        found = getattr(model.get_audio_features(batch["input_features"], batch["audio_lengths"]), integration)
        assert torch.equal(found.states, out)
        assert found.lengths.tolist() == valid.tolist() == [18]
        assert int((batch["input_ids"] == AUDIO_ID).sum()) == (18 if integration == "plits" else 0)
        assert model(**batch).logits.isfinite().all()


def test_projections_per_layer():
    model = build_pal(entry("clap"), dtype=torch.float64, layers=[0, 2], projection="per_layer")
    batch = batch_of(model, [f"{AUDIO_TOKEN} what?"], [tone()])
    assert sorted(model.layer_projector) == ["0", "2"]
    with torch.no_grad():
        (tokens,) = encoded(model, batch)
        own = [model.layer_projector[str(i)](tokens) if i != 1 else None for i in range(LAYERS)]
        row = Row(batch["input_ids"][0], own, torch.zeros(len(tokens), dtype=torch.long))
        got, want = model(**batch).logits[0], oracle_logits(model.language_model, row, [0, 2], "sequence")
        torch.testing.assert_close(got, want, **CLOSE)


MIXED = [
    [entry("whisper")],
    [entry("whisper", "plits")],
    [entry("whisper", "plits"), entry("sslam")],
    [entry("whisper", "plits"), entry("sslam", "flamingo")],
    [entry("clap", "lal", "qformer"), entry("whisper")],
]
WAYS = ["lal", "plits", "plits+lal", "plits+flamingo"]


def build_any(entries):
    settings = {"flamingo": {"every": 2}} if any(x["integration"] == "flamingo" for x in entries) else {}
    return open_gates(build_pal(*entries, dtype=torch.float64, **settings))


def test_flamingo_begins_as_the_text_alone():
    model = build_pal(entry("whisper", "flamingo"), flamingo={"every": 1})
    batch = batch_of(model)
    with torch.no_grad():
        want = model.language_model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        closed = model(**batch).logits
        opened = open_gates(model)(**batch).logits
    valid = batch["attention_mask"] != 0
    torch.testing.assert_close(closed[valid], want[valid], **CLOSE)
    assert not torch.allclose(opened[valid], want[valid], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("entries", MIXED, ids=[*WAYS, "lal+lal"])
def test_rows_are_what_they_are_alone(entries, side):
    """With and without audio, several clips, clips of different lengths, padding on either side."""
    model = build_any(entries)
    audio = clips()
    batch = batch_of(model, padding_side=side)
    with torch.no_grad():
        together = model(**batch).logits
        for b, own in enumerate([audio[:1], audio[1:], []]):
            alone = model(**batch_of(model, [TEXTS[b]], own)).logits[0]
            got = together[b][batch["attention_mask"][b] != 0]
            torch.testing.assert_close(got, alone, **CLOSE)


@pytest.mark.parametrize("entries", MIXED, ids=[*WAYS, "lal+lal"])
def test_several_clips_of_any_length(entries):
    """Rows whose clips fill them unevenly, one clip twice, texts in any order of clips."""
    model = build_any(entries)
    short, middle, long = tone(seconds=0.02), tone(200, 0.1), tone(300, 0.3)
    texts = [f"{AUDIO_TOKEN}a{AUDIO_TOKEN}", f"b{AUDIO_TOKEN}{AUDIO_TOKEN}c{AUDIO_TOKEN}", f"{AUDIO_TOKEN} d"]
    audio = [[short, middle], [long, short, long], [middle]]
    batch = dict(processor_of(model)(texts, audio, 16_000))
    assert len(batch["audio_lengths"]) == 3
    with torch.no_grad():
        together = model(**batch).logits
        for b, own in enumerate(audio):
            alone = model(**batch_of(model, [texts[b]], own)).logits[0]
            torch.testing.assert_close(together[b][batch["attention_mask"][b] != 0], alone, **CLOSE)


def test_texts_share_a_clip():
    """It is encoded once; what each text computes is as with a clip of its own."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), dtype=torch.float64)
    texts, clip = [f"what is {AUDIO_TOKEN}?", f"{AUDIO_TOKEN} when?"], tone()
    shared = batch_of(model, texts, [clip, clip])
    own = batch_of(model, texts, [clip, clip.clone()])
    assert (len(shared["audio_lengths"]), len(own["audio_lengths"])) == (1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(**shared).logits, model(**own).logits, **CLOSE)


@pytest.mark.parametrize("integration", ["lal", "plits"])
def test_one_clip_per_text_needs_no_index(integration):
    model = build_pal(entry("whisper", integration))
    batch = batch_of(model, [f"a{AUDIO_TOKEN}b", f"bc{AUDIO_TOKEN}"], [tone(), tone(200)])
    with torch.no_grad():
        want = model(**batch).logits
        plain = {**batch, "audio_index": None, "insert_at": batch["insert_at"][:, 0]}
        assert torch.equal(model(**plain).logits, want)
        plain["audio_lengths"] = batch["audio_lengths"][:, 0]
        assert torch.equal(model(**plain).logits, want)


def test_labels_of_placeholders_do_not_count():
    model = build_pal(entry("whisper", "plits"))
    batch = batch_of(model, [f"a {AUDIO_TOKEN} b", f"{AUDIO_TOKEN} c"], [tone(), tone(200)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        found = model(**batch, labels=labels)
        shifted = labels.masked_fill(labels == AUDIO_ID, -100)[:, 1:]
        want = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(found.loss, want)


@pytest.mark.parametrize("entries", MIXED[:4], ids=WAYS)
def test_generation_is_the_forward_without_a_cache(entries, monkeypatch):
    model = build_any(entries)
    batch = batch_of(model)
    calls = []
    real = model.audio_tower[0].forward
    monkeypatch.setattr(model.audio_tower[0], "forward", lambda x: calls.append(1) or real(x))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    got = model.generate(**batch, **settings)
    assert len(calls) == 1  # the audio is encoded once
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        for _ in range(4):
            rest = {name: x for name, x in batch.items() if name not in ("input_ids", "attention_mask")}
            logits = model(input_ids=ids, attention_mask=mask, **rest, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(got, ids)
    assert torch.equal(model.generate(**batch, **settings, cache_implementation="static", disable_compile=True), got)


@pytest.mark.parametrize("entries", MIXED[:4], ids=WAYS)
def test_beams_and_samples(entries):
    model = build_any(entries)
    batch = batch_of(model)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **settings)
    for b, own in enumerate([clips()[:1], clips()[1:], []]):
        alone = model.generate(**batch_of(model, [TEXTS[b]], own), **settings)
        assert together[b, -4:].tolist() == alone[0, -4:].tolist()
    torch.manual_seed(1)
    sampled = model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert sampled.shape == (6, batch["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("entries", MIXED[:4], ids=WAYS)
def test_a_conversation_goes_on_with_its_cache(entries):
    """Second question after a second clip: as from the start, the first text not computed again."""
    model = build_any(entries)
    first, second = tone(), tone(300, 0.06)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    start = batch_of(model, [f"one {AUDIO_TOKEN}?"], [first])
    begun = model.generate(**start, **settings, return_dict_in_generate=True)
    more = batch_of(model, [f"one {AUDIO_TOKEN}?{AUDIO_TOKEN} two?"], [first, second])
    prompt = start["input_ids"].shape[1]
    # The answer's tokens, as they are, between the first question and the second.
    answer = begun.sequences[:, prompt:]
    more["input_ids"] = torch.cat([more["input_ids"][:, :prompt], answer, more["input_ids"][:, prompt:]], dim=1)
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    more["insert_at"][:, 1] += 3
    want = model.generate(**more, **settings)
    lengths = []
    hook = model.language_model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    got = model.generate(**more, **settings, past_key_values=begun.past_key_values)
    hook.remove()
    assert torch.equal(got, want)
    assert lengths[0] == more["input_ids"].shape[1] - prompt - 2  # the last answer token was never fed


def test_features_are_used_again_and_stepwise():
    """audio_features in place of input_features: the same; a loop of forwards with a cache, as generate does."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), dtype=torch.float64)
    batch = batch_of(model, TEXTS[:1], clips()[:1])
    with torch.no_grad():
        features = model.get_audio_features(batch.pop("input_features"), batch.pop("audio_lengths"))
        assert isinstance(features, AudioFeatures)
        want = model.generate(**batch, audio_features=features, max_new_tokens=3, do_sample=False, eos_token_id=None)
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        ids, mask, new = batch["input_ids"], batch["attention_mask"], batch["input_ids"]
        rest = {"insert_at": batch["insert_at"], "audio_features": features, "past_key_values": cache}
        for _ in range(3):
            logits = model(input_ids=new, attention_mask=mask, **rest).logits
            new = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(ids, want)


def test_what_does_not_fit_is_refused():
    model = build_pal(entry("whisper", "plits"), entry("sslam"))
    batch = batch_of(model)
    fewer = batch["input_ids"].clone()
    fewer[0][(fewer[0] == AUDIO_ID).nonzero()[0]] = 9
    with pytest.raises(
        ValueError, match=r"a placeholder, token 2, for each PLITS token, \[5, 6, 0\] .*got \[4, 6, 0\]"
    ):
        model(**{**batch, "input_ids": fewer})
    with pytest.raises(ValueError, match="audio must be given for 11 placeholders"):
        model(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match="input_features must hold a tensor for each of 2 towers, got 1"):
        model(**{**batch, "input_features": batch["input_features"][0]})
    with pytest.raises(ValueError, match=r"audio_lengths must be \(C, towers\) = \(3, 2\), got \(3, 1\)"):
        model(**{**batch, "audio_lengths": batch["audio_lengths"][:, :1]})
    with pytest.raises(TypeError, match=r"audio_index must have an integer dtype, got torch.float32"):
        model(**{**batch, "audio_index": batch["audio_index"].float()})
    with pytest.raises(ValueError, match="audio_index must be from -1 to 2"):
        model(**{**batch, "audio_index": batch["audio_index"] + 1})
    with pytest.raises(ValueError, match=r"audio_index must be \(B, K\) with B = 3"):
        model(**{**batch, "audio_index": batch["audio_index"][:2]})
    with pytest.raises(ValueError, match=r"insert_at must be \(B, K\) = \(3, 2\), got \(3,\)"):
        model(**{**batch, "insert_at": batch["insert_at"][:, 0]})
    with pytest.raises(ValueError, match="input_features or audio_features, got both"):
        model(**batch, audio_features=AudioFeatures(Clips(torch.zeros(1, 1, 64), torch.ones(1, dtype=torch.long))))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        model(attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="audio_index must be given for 3 clips and 2 texts"):
        model(**batch_of(model, TEXTS[:2]) | {"audio_index": None})
