"""Neighbouring states joined to one in a whole audio LLM."""

import copy

import pytest
import torch
from support.audio_llm import AUDIO_ID, batch_of, build_pal, entry, logits, processor_of, tone

from palkernels.model import PalConfig, PalForConditionalGeneration, PalProcessor


def stacking(tower_type, integration, stack, connector="mlp"):
    described = copy.deepcopy(entry(tower_type, integration, connector))
    described["connector"]["config"]["stack"] = stack
    return described


ENTRIES = {
    "lal": [stacking("whisper", "lal", 4)],
    "plits": [stacking("whisper", "plits", 4)],
    "both": [stacking("whisper", "plits", 3), stacking("sslam", "lal", 8), stacking("clap", "lal", 2, "qformer")],
}
CLIPS = [tone(seconds=0.1), tone(300, 0.5), tone(700, 0.07)]  # of 5, 25 and 4 states of Whisper


@pytest.mark.parametrize("name", ENTRIES)
def test_texts_have_a_placeholder_for_each_group(name):
    """The processor counts what the connector makes, and the model takes it."""
    model = build_pal(*ENTRIES[name])
    batch = batch_of(model, audio=CLIPS)
    stack = ENTRIES[name][0]["connector"]["config"]["stack"]
    groups = [-(-n // stack) for n in (5, 25, 4)]
    if name == "lal":
        assert not processor_of(model).num_placeholders(batch["audio_lengths"]).any()
    else:
        assert (batch["input_ids"] == AUDIO_ID).sum(dim=1).tolist() == [groups[0], groups[1] + groups[2], 0]
    with torch.no_grad():
        features = model.get_audio_features(batch["input_features"], batch["audio_lengths"])
    first = features.lal if name == "lal" else features.plits
    assert first.lengths.tolist() == groups
    assert logits(model, batch).isfinite().all()
    assert model.generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=None).shape[0] == 3


def test_clips_do_not_depend_on_their_batch():
    model = build_pal(*ENTRIES["both"], dtype=torch.float64)
    batch = batch_of(model, audio=CLIPS)

    def of_clip(inputs, clip):
        features = model.get_audio_features(inputs["input_features"], inputs["audio_lengths"])
        return [clips.states[clip][: clips.lengths[clip]] for clips in features.by_integration().values()]

    with torch.no_grad():
        for clip in range(3):
            alone = {"input_features": [x[clip : clip + 1] for x in batch["input_features"]]}
            alone["audio_lengths"] = batch["audio_lengths"][clip : clip + 1]
            for got, want in zip(of_clip(batch, clip), of_clip(alone, 0), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_saved_and_loaded(tmp_path):
    model = build_pal(*ENTRIES["both"])
    batch = batch_of(model, audio=CLIPS)
    model.save_pretrained(tmp_path)
    processor_of(model).save_pretrained(tmp_path)
    again = PalForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = PalProcessor.from_pretrained(tmp_path)
    assert [connector.config for connector in again.multi_modal_projector] == [
        connector.config for connector in model.multi_modal_projector
    ]
    assert again.multi_modal_projector[0].linear_1.in_features == 3 * 16
    assert torch.equal(logits(again, batch), logits(model, batch))
    lengths = batch["audio_lengths"]
    assert torch.equal(processor.num_placeholders(lengths), processor_of(model).num_placeholders(lengths))


def test_a_grid_is_not_stacked():
    """LFST's cells stand on a grid; its config says so before anything is built."""
    text = build_pal(entry("sslam")).config.text_config
    for described, message in (
        (stacking(["sslam", "clap"], "lal", 2, "lfst"), r"connector 'lfst' must have keys of .*, got .*'stack': 2"),
        (entry("sslam") | {"connector": {"type": "mlp", "config": {"stacks": 2}}}, r"'mlp' must have keys of"),
        (entry("sslam") | {"connector": {"type": "mlp", "config": [2]}}, r"'mlp' must have keys of"),
    ):
        with pytest.raises(ValueError, match=message):
            PalConfig(text_config=text, encoders=[described])
