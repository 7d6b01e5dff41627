"""Clips longer than an encoder hears: cut into windows, encoded apart, joined as one clip."""

import copy

import pytest
import torch
from support.audio_llm import (
    AUDIO_ID,
    AUDIO_TOKEN,
    CLOSE,
    LAYERS,
    batch_of,
    build_pal,
    entry,
    labelled,
    logits,
    open_gates,
    processor_of,
    tone,
)
from support.oracles import Row, oracle_logits
from transformers import DynamicCache

from palkernels.model import AudioError, PalForConditionalGeneration, PalProcessor
from palkernels.model.audio.resampling import resample

EXACT = {"rtol": 1e-9, "atol": 1e-10}
STACKED = entry("sslam")
STACKED = STACKED | {"connector": {"type": "mlp", "config": {"stack": 7}}}  # does not divide 512
SHORT = entry("whisper")
SHORT = SHORT | {"config": SHORT["config"] | {"window_seconds": 3}}
# By name: an encoder, and the seconds that it hears.
ENCODERS = {
    "whisper": (entry("whisper"), 30.0),
    "short whisper": (SHORT, 3.0),
    "clap": (entry("clap"), 10.0),
    "sslam": (entry("sslam"), 10.24),
    "stacked": (STACKED, 10.24),
    "qformer": (entry("clap", "lal", "qformer"), 10.0),
    "lfst": (entry(["sslam", "clap"], "lal", "lfst"), 10.0),
}


def sound(seconds, seed=0):
    """(samples,) of noise under a slow tone, which differs from window to window."""
    noise = torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(seed))
    return 0.1 * noise + tone(200 + 50 * seed, seconds)


@torch.no_grad()
def by_hand(model, clip, seconds):
    """A clip's tokens (n, d): of each window, encoded alone, the valid ones, one window after the other."""
    tokens = []
    rates = [tower.sampling_rate for tower in model.audio_tower]
    cut = [resample(clip, 16_000, rate).split(round(seconds * rate)) for rate in rates]
    for window in zip(*cut, strict=True):
        states, valid = [], []
        for tower, samples in zip(model.audio_tower, window, strict=True):
            features, lengths = tower.features([samples])
            states.append(tower(features.double()))
            valid.append(lengths)
        inputs = tuple(states) if len(states) > 1 else states[0]
        connected, count = model.multi_modal_projector[0].connect(inputs, valid[0])
        tokens.append(connected[0, : int(count[0])])
    return torch.cat(tokens)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_long_clip_is_its_windows_one_after_the_other(name):
    """In a batch of shorter and longer ones, whose texts hear one, two or none; the text's logits are the oracle's."""
    described, seconds = ENCODERS[name]
    model = build_pal(described, dtype=torch.float64)
    clips = [sound(0.3), sound(2 * seconds + 0.7, 1), sound(seconds, 2)]
    batch = batch_of(model, audio=clips)
    features = batch["input_features"]
    for tensor in features if isinstance(features, list) else [features]:
        assert tensor.shape[0] == 1 + 3 + 1
    assert batch["audio_lengths"].shape == (3, len(model.audio_tower))
    want = [by_hand(model, clip, seconds) for clip in clips]
    found = model.get_audio_features(features, batch["audio_lengths"]).lal
    assert found.lengths.tolist() == [len(tokens) for tokens in want]
    for states, tokens in zip(found.states, want, strict=True):
        torch.testing.assert_close(states[: len(tokens)], tokens, **EXACT)
    got = model(**batch).logits
    language_model, mask = model.language_model, batch["attention_mask"] != 0
    for b, heard in enumerate([[0], [1, 2], []]):
        places = [int(place) for place in batch["insert_at"][b]]
        tokens = torch.cat([want[clip] for clip in heard]) if heard else torch.zeros(0, 64, dtype=torch.float64)
        where = [torch.full((len(want[clip]),), place) for clip, place in zip(heard, places, strict=False)]
        row = Row(batch["input_ids"][b][mask[b]], [tokens] * LAYERS, torch.cat([torch.zeros(0).long(), *where]))
        expected = oracle_logits(language_model, row, [0, 1, 2], "sequence")
        torch.testing.assert_close(got[b][mask[b]], expected, **CLOSE)


SEVERAL = {
    "plits+lal+lal": [entry("whisper", "plits"), entry("sslam"), entry("clap", "lal", "qformer")],
    "plits+lfst": [entry("whisper", "plits"), entry(["sslam", "clap"], "plits", "lfst"), entry("clap")],
}


@pytest.mark.parametrize("name", SEVERAL)
@torch.no_grad()
def test_encoders_with_other_windows_hear_one_clip(name):
    """25 s are one window of Whisper and three of the others: as many rows as clips, or more. Each clip is what it is
    alone, and texts have its placeholders."""
    model = build_pal(*SEVERAL[name], dtype=torch.float64)
    clips = [sound(25), sound(0.2, 1), sound(10.1, 2)]
    batch = batch_of(model, audio=clips)
    rows = [tensor.shape[0] for tensor in batch["input_features"]]
    assert rows == {"plits+lal+lal": [3, 5, 6], "plits+lfst": [3, 6, 6, 6]}[name]
    found = model.get_audio_features(batch["input_features"], batch["audio_lengths"])
    for number, clip in enumerate(clips):
        alone = batch_of(model, [AUDIO_TOKEN], [clip])
        assert batch["audio_lengths"][number].tolist() == alone["audio_lengths"][0].tolist()
        want = model.get_audio_features(alone["input_features"], alone["audio_lengths"])
        assert (alone["input_ids"] == AUDIO_ID).sum() == want.plits.lengths[0]
        for ours, its in ((found.plits, want.plits), (found.lal, want.lal)):
            assert ours.lengths[number] == its.lengths[0]
            n = int(its.lengths[0])
            torch.testing.assert_close(ours.states[number, :n], its.states[0, :n], **EXACT)
    per_text = (batch["input_ids"] == AUDIO_ID).sum(dim=1).tolist()
    lengths = found.plits.lengths.tolist()
    assert per_text == [lengths[0], lengths[1] + lengths[2], 0]


@pytest.mark.parametrize("integration", ["lal", "plits", "flamingo", "summary"])
def test_trained_and_generated(integration):
    """A long clip beside a short one, by its number: the loss has gradients, and a cache goes on as the whole."""
    settings = {"flamingo": {"every": 1}} if integration == "flamingo" else {}
    settings |= {"summary_tokens": 3} if integration == "summary" else {}
    way = "lal" if integration == "summary" else integration
    model = open_gates(build_pal(entry("clap", way), dtype=torch.float64, **settings))
    texts = [f"{AUDIO_TOKEN}a", f"b {AUDIO_TOKEN} or {AUDIO_TOKEN}?", f"{AUDIO_TOKEN} again"]
    long, short = sound(21), sound(0.4, 3)
    batch = batch_of(model, texts, [[long], [short, long], [short]])
    assert batch["input_features"].shape[0] == 4
    assert batch["audio_index"].tolist() == [[0, -1], [1, 0], [1, -1]]
    model.train()(**labelled(batch)).loss.backward()
    gradient = model.multi_modal_projector[0].linear_1.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    model.eval()
    whole = logits(model, batch)
    start, cache = batch["input_ids"].shape[1] - 3, DynamicCache()
    first = {name: batch[name][:, :start] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**batch | first, past_key_values=cache)
        last = model(batch["input_ids"][:, start:], batch["attention_mask"], past_key_values=cache).logits
    torch.testing.assert_close(last, whole[:, start:], **CLOSE)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    together = model.generate(**batch, **options)[:, -3:]
    for b, clips in enumerate([[long], [short, long], [short]]):
        alone = model.generate(**batch_of(model, texts[b : b + 1], [clips]), **options)[:, -3:]
        assert torch.equal(together[b : b + 1], alone)


def test_states_of_windows_may_hold_anything_where_they_are_not_valid():
    """Cut as a cache keeps them, with NaN behind each window's last valid state."""
    model = build_pal(entry("whisper", "plits"), STACKED, entry("clap", "lal", "qformer"), dtype=torch.float64)
    batch = batch_of(model, audio=[sound(12), sound(0.2, 1), sound(10.24, 2)])
    want = logits(model, batch)
    most = {"whisper": [600, 10, 512], "sslam": [512, 88, 16, 512], "clap": [64, 14, 2, 64, 2]}
    assert batch["audio_lengths"].tolist() == [[600, 600, 78], [10, 16, 2], [512, 512, 66]]
    poisoned = []
    with torch.no_grad():
        for tower, features, valid in zip(model.audio_tower, batch["input_features"], most.values(), strict=True):
            states = tower(features)
            assert states.shape[0] == len(valid)
            states[torch.arange(states.shape[1]) >= torch.tensor(valid).unsqueeze(1)] = torch.nan
            poisoned.append(states[:, : max(valid)])
    del batch["input_features"]
    torch.testing.assert_close(logits(model, batch | {"encoder_states": poisoned}), want, **EXACT)


def test_an_hour_passes_the_encoder_in_batches(monkeypatch):
    """No more windows at once than the config says, and the states are those of all at once."""
    model = build_pal(entry("clap"), dtype=torch.float64, encoder_batch=4)
    batch = batch_of(model, [f"{AUDIO_TOKEN} and {AUDIO_TOKEN}"], [sound(95), sound(1)])
    sizes = []
    hook = model.audio_tower[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    with torch.no_grad():
        few = model.get_audio_features(batch["input_features"], batch["audio_lengths"]).lal
        assert sizes == [4, 4, 3]
        model.config.encoder_batch = 16
        all_at_once = model.get_audio_features(batch["input_features"], batch["audio_lengths"]).lal
    hook.remove()
    assert sizes[3:] == [11]
    assert few.lengths.tolist() == all_at_once.lengths.tolist() == [608, 8]
    torch.testing.assert_close(few.states, all_at_once.states, **EXACT)


def test_rows_that_are_not_the_clips_windows_are_refused():
    model = build_pal(entry("clap", "plits"), entry("whisper"))
    batch = batch_of(model, audio=[sound(12), sound(0.2), sound(0.3)])
    clap, whisper = batch["input_features"]
    assert (clap.shape[0], whisper.shape[0]) == (4, 3)
    for features, message in (
        ([torch.cat([clap, clap[:1]]), whisper], r"those of 5 windows of 64 states, got \[78, 2, 2\] of 4"),
        ([clap, whisper[:2]], r"those of 2 windows of 1500 states, got \[600, 10, 15\] of 3"),
        ([clap[:3], whisper], r"lengths must be from 0 to 64, got \[78, 2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch | {"input_features": features})


def test_how_long_a_clip_may_be(tmp_path):
    """As long as its bytes may be, unless seconds are given; saved as they were given."""
    encoders = [entry("sslam"), entry("whisper", "plits")]
    processor = processor_of(build_pal(*encoders))
    assert processor.max_seconds is None
    batch = processor(AUDIO_TOKEN, sound(31), 16_000)
    assert batch["audio_lengths"].tolist() == [[512 * 3 + 8 * 2, 1550]]
    processor.save_pretrained(tmp_path)
    assert PalProcessor.from_pretrained(tmp_path).max_seconds is None
    limited = PalProcessor(processor.tokenizer, encoders, max_seconds=12.5)
    limited(AUDIO_TOKEN, sound(12.5), 16_000)
    with pytest.raises(AudioError, match=r"at most 12.5 s long, got 12.51 s"):
        limited(AUDIO_TOKEN, sound(12.51), 16_000)
    hour = torch.zeros(1).expand(3600 * 16_000)
    assert hour.numel() * 4 < processor.max_bytes
    with pytest.raises(AudioError, match=r"at most 4000 s long, got 4001.00 s"):
        processor(AUDIO_TOKEN, torch.zeros(1).expand(4001 * 8_000), 8_000)
    for wrong in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_seconds must be positive and finite, or None, got"):
            PalProcessor(processor.tokenizer, encoders, max_seconds=wrong)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000, 11_025])
@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_fused_encoders_are_cut_at_the_same_times(rate, surplus):
    """A sample more or less than two whole windows, at rates that are converted to both encoders'."""
    processor = processor_of(build_pal(entry(["sslam", "clap"], "plits", "lfst")))
    noise = sound(21).repeat(4)[: 20 * rate + surplus]
    features, lengths = processor.audio_features([noise], rate)
    count = 3 if surplus > 0 else 2
    assert [tensor.shape[0] for tensor in features] == [count, count]
    assert lengths.tolist() == [[504 * 2 + 8 * (count - 2), 64 * 2 + 2 * (count - 2)]]
    assert processor.state_lengths(lambda hertz: -(-noise.numel() * hertz // rate)).tolist() == lengths[0].tolist()
    assert processor.num_placeholders(lengths).tolist() == [9 * 63 * 2 + 9 * (count - 2)]


def test_placeholders_are_counted_window_by_window():
    """Where groups do not divide a window, and where a connector makes as many tokens of any."""
    stacked = copy.deepcopy(STACKED) | {"integration": "plits"}
    processor = processor_of(build_pal(stacked, entry("clap", "plits", "qformer")))
    lengths = torch.tensor([[512, 64], [8, 2], [1024, 128], [1032, 66], [0, 0]])
    grouped, gathered = [74, 2, 148, 148 + 2, 0], [5, 5, 10, 10, 0]
    assert processor.num_placeholders(lengths).tolist() == [a + b for a, b in zip(grouped, gathered, strict=True)]


def test_another_window_needs_no_other_weights(tmp_path):
    """A saved model keeps its window, and takes another one by its config alone."""
    model = build_pal(SHORT)
    batch = batch_of(model, audio=[sound(7), sound(0.3, 1), sound(3, 2)])
    assert batch["input_features"].shape == (5, 80, 300)
    model.save_pretrained(tmp_path)
    again = PalForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(model, batch))
    config = copy.deepcopy(model.config)
    config.encoders[0]["config"]["window_seconds"] = None
    whole = PalForConditionalGeneration.from_pretrained(tmp_path, config=config).eval()
    heard = batch_of(whole, audio=[sound(7), sound(0.3, 1), sound(3, 2)])
    assert heard["input_features"].shape == (3, 80, 3000)
    assert torch.equal(heard["audio_lengths"], batch["audio_lengths"])
    assert logits(whole, heard).isfinite().all()
