"""The models of a preset: the same parts, by PLITS and by LAL, as a server loads them."""

from pathlib import Path

import pytest
import torch
from support.figure1 import tiny_config
from support.towers import equal

from palkernels.bench.presets import PRESETS
from palkernels.bench.serving.models import served_models
from palkernels.bench.serving.settings import Options
from palkernels.model import PalForConditionalGeneration, PalProcessor


def test_both_have_the_same_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "smollm2-135m", tiny_config)
    options = Options(("smollm2-135m",), (1,), (1,), 1, 0.5, 8, 4, "tiny", "fp32", 0, 1.0, tmp_path)
    models = served_models(options, tmp_path)
    assert [model.name for model in models] == ["plits", "lal"]
    plits, lal = (PalForConditionalGeneration.from_pretrained(model.directory) for model in models)
    assert [plits.config.uses(way) for way in ("plits", "lal")] == [True, False]
    assert [lal.config.uses(way) for way in ("plits", "lal")] == [False, True]
    for part in ("language_model", "audio_tower"):
        assert equal(getattr(plits, part).state_dict(), getattr(lal, part).state_dict())
    processor = PalProcessor.from_pretrained(models[1].directory)
    content = [{"type": "audio", "audio": {"array": torch.zeros(8_000).numpy(), "sampling_rate": 16_000}}]
    content += [{"type": "text", "text": "x" * options.characters}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    longest = inputs["input_ids"].shape[1] + int(inputs["audio_lengths"].sum()) + options.new_tokens
    assert models[0].tokens is not None
    assert longest <= models[0].tokens
