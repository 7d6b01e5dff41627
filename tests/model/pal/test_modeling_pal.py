"""A whole audio LLM against stock models on the concatenated sequence, and against the oracle."""

import pytest
import torch
from support.audio_llm import (
    AUDIO_ID,
    AUDIO_TOKEN,
    CLOSE,
    LAYERS,
    TEXTS,
    batch_of,
    build_pal,
    entry,
    open_gates,
    tone,
)
from support.oracles import Row, oracle_logits

from palkernels.model import AudioFeatures, LalConfig, attach
from palkernels.model.connectors.base import cut_padding
from palkernels.model.pal.clips import Clips


def encoded(model, batch, entry_index=0):
    """Each clip's states after its connector, without padding."""
    features = batch["input_features"]
    features = features if isinstance(features, list) else [features]
    states = model.audio_tower[entry_index](features[entry_index])
    out, valid = model.multi_modal_projector[entry_index].connect(states, batch["audio_lengths"][:, entry_index])
    return [row[:n] for row, n in zip(out, valid.tolist(), strict=True)]


def row_of(batch, b):
    """A text's ids without padding, and its clips with the place of each."""
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
    """Compare every text's logits with the oracle's; ``lal`` and ``plits`` give each clip's tokens."""
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
    """To the bit for the embeddings that it is given. The clips' are rounded as the padding is that they come with."""
    model = build_pal(entry(kind, "plits"), family=family)
    batch, given = batch_of(model), []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        got, tokens = model(**batch).logits, encoded(model, batch)
        hook.remove()
        order = [clip for own in batch["audio_index"].tolist() for clip in own if clip >= 0]
        embeds = embeds_of(model, batch["input_ids"], torch.cat([tokens[clip] for clip in order]))
        want = model.language_model(inputs_embeds=given[0], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(got, want)
    is_text = batch["input_ids"] != AUDIO_ID
    assert torch.equal(given[0][is_text], embeds[is_text])
    torch.testing.assert_close(given[0], embeds, rtol=1e-5, atol=1e-6)


def test_lal_in_no_layer_is_the_text_alone():
    with pytest.warns(UserWarning, match="layers should name a layer that hears the audio, got none"):
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
    """Whisper enters by PLITS; SSLAM and CLAP by LAL at the same place, in the order of the config."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), entry("clap"), dtype=torch.float64, layers=[0, 2])

    def lal(batch):
        return [torch.cat(pair) for pair in zip(encoded(model, batch, 1), encoded(model, batch, 2), strict=True)]

    check_against_oracle(model, lal=lal, plits=lambda batch: encoded(model, batch), layers=[0, 2])


def summaries(tokens, count):
    return [torch.nn.functional.adaptive_avg_pool1d(x.T[None], count)[0].T for x in tokens]


@pytest.mark.parametrize("layers", [[], [1, 2]])
def test_summary_tokens(layers):
    """A few tokens enter by PLITS and all of them by LAL; with no layer for LAL only the few are left."""
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
        lengths = batch["audio_lengths"][:, 0]
        whole, _ = model.multi_modal_projector[0].connect(pair, lengths)
        out, valid = model.multi_modal_projector[0].connect(cut_padding(pair, lengths), lengths)
        found = getattr(model.get_audio_features(batch["input_features"], batch["audio_lengths"]), integration)
        assert torch.equal(found.states, out)
        torch.testing.assert_close(out, whole[:, :18])
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


def test_the_language_model_is_attached_as_the_config_says():
    model = build_pal(entry("sslam"), layers=range(1, 3), rope="none", impl="sdpa", recompute_audio_kv=True)
    config = LalConfig(layers=(1, 2), rope="none", impl="sdpa", recompute_audio_kv=True)
    assert attach(model.language_model, config).config == config
    assert not hasattr(build_pal(entry("sslam", "plits")).language_model, "_palkernels_handle")


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
    with pytest.raises(ValueError, match=r"audio_lengths must be \(C, towers\) with 2 towers, got \(3, 1\)"):
        model(**{**batch, "audio_lengths": batch["audio_lengths"][:, :1]})
    with pytest.raises(TypeError, match=r"audio_index must have an integer dtype, got torch.float32"):
        model(**{**batch, "audio_index": batch["audio_index"].float()})
    with pytest.raises(ValueError, match="audio_index must be from -1 to 2"):
        model(**{**batch, "audio_index": batch["audio_index"] + 1})
    with pytest.raises(ValueError, match=r"audio_index must be \(B, K\) with B = 3"):
        model(**{**batch, "audio_index": batch["audio_index"][:2]})
    with pytest.raises(ValueError, match=r"insert_at must be \(B, K\) = \(3, 2\), got \(3,\)"):
        model(**{**batch, "insert_at": batch["insert_at"][:, 0]})
    with pytest.raises(ValueError, match="got input_features and audio_features"):
        model(**batch, audio_features=AudioFeatures(Clips(torch.zeros(1, 1, 64), torch.ones(1, dtype=torch.long))))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        model(attention_mask=batch["attention_mask"])
    lal = build_pal(entry("sslam"))
    with pytest.raises(ValueError, match="audio_index must be given for 3 clips and 2 texts"):
        lal(**batch_of(lal, TEXTS[:2]) | {"audio_index": None})
