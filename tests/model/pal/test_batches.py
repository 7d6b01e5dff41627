"""Texts of a batch are what they are alone, whichever clips they hear and wherever the padding is."""

import pytest
import torch
from support.audio_llm import (
    AUDIO_ID,
    AUDIO_TOKEN,
    CLOSE,
    MIXED,
    TEXTS,
    batch_of,
    build_mixed,
    build_pal,
    entry,
    labelled,
    processor_of,
    three_clips,
    tone,
)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MIXED)
def test_rows_are_what_they_are_alone(name, side):
    """Texts with no clip, one and two, clips of different lengths, padding on either side."""
    model = build_mixed(name)
    audio = three_clips()
    batch = batch_of(model, padding_side=side)
    with torch.no_grad():
        together = model(**batch).logits
        for b, own in enumerate([audio[:1], audio[1:], []]):
            alone = model(**batch_of(model, [TEXTS[b]], own)).logits[0]
            got = together[b][batch["attention_mask"][b] != 0]
            torch.testing.assert_close(got, alone, **CLOSE)


@pytest.mark.parametrize("name", MIXED)
def test_several_clips_of_any_length(name):
    """Texts hear clips of uneven lengths, one clip twice, and clips in any order."""
    model = build_mixed(name)
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
    """A shared clip is encoded once, and each text computes what it does with a clip of its own."""
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


def test_placeholders_have_no_labels():
    """Whoever counts or smooths labels outside the model would count what it passes over within: they are refused."""
    model = build_pal(entry("whisper", "plits"))
    batch = batch_of(model, [f"a {AUDIO_TOKEN} b", f"{AUDIO_TOKEN} c"], [tone(), tone(200)])
    text = batch["attention_mask"] != 0
    with pytest.raises(ValueError, match=r"labels must be -100 at placeholders, got others: labels.masked_fill"):
        model(**batch, labels=batch["input_ids"].masked_fill(~text, -100))
    shifted = torch.nn.functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    with pytest.raises(ValueError, match=r"labels must be -100 at placeholders"):
        model(**batch, shift_labels=shifted)
    with torch.no_grad():
        found = model(**labelled(batch))
        labels = batch["input_ids"].masked_fill(~text | (batch["input_ids"] == AUDIO_ID), -100)[:, 1:]
        want = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found.loss, want)


def test_clips_in_the_order_of_their_placeholders_need_no_index():
    """Texts with as many placeholders as their clips have tokens, in order, say by themselves which clips they hear."""
    model = build_pal(entry("whisper", "plits"), entry("sslam"), dtype=torch.float64)
    clips = [tone(), tone(300, 0.04), tone(200, 0.3)]
    for texts in (TEXTS, [f"{AUDIO_TOKEN} {AUDIO_TOKEN}", "none", f"{AUDIO_TOKEN}"], TEXTS[:2]):
        batch = batch_of(model, texts, clips)
        with torch.no_grad():
            assert torch.equal(model(**batch | {"audio_index": None}).logits, model(**batch).logits)
    batch = batch_of(model, [f"{AUDIO_TOKEN} {AUDIO_TOKEN}", f"{AUDIO_TOKEN}"], clips[:1] * 3)  # one clip, heard thrice
    with pytest.raises(ValueError, match="audio_index must be given for 1 clips and 2 texts"):
        model(**batch | {"audio_index": None})


@pytest.mark.parametrize(("name", "shape"), [("audio_lengths", "2 towers"), ("insert_at", r"= \(3, 2\)")])
def test_the_same_numbers_in_another_shape_are_refused(name, shape):
    """Transposed or flattened they would be as many, for other clips."""
    model = build_mixed("lal+lal")  # three clips for two towers, three texts with up to two clips
    batch = batch_of(model)
    assert batch[name].shape == (3, 2)
    for other in (batch[name].T.contiguous(), batch[name].flatten()):
        with pytest.raises(ValueError, match=rf"{name} must be .* {shape}, got \({other.shape[0]},"):
            model(**batch | {name: other})
