"""Clips that are damaged within: found and counted before a batch fails."""

import numpy as np
import pytest
import soundfile
from support.audio_llm import entry
from support.samples import row, said, small_processor, write_clip, write_damaged, write_lines

from palkernels.model.data.decoding import decodable
from palkernels.model.data.reading import read


@pytest.fixture
def samples(tmp_path):
    """Read by their headers alone: three that are whole, one of them heard twice, and two that are not."""
    write_damaged(tmp_path / "broken.flac")
    for i in range(2):
        write_clip(tmp_path / f"{i}.wav", 0.1 + i / 10)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, float("nan")] * 100), 16_000, subtype="FLOAT")
    rows = [row("0.wav", "a"), row("broken.flac", "b"), row("1.wav", "c"), row("nan.wav", "d"), row("0.wav", "e")]
    both = row(["1.wav", "broken.flac"], "f", "<audio>or<audio>?")
    return read(write_lines(tmp_path / "calls.jsonl", *rows, both, row("gone.wav")))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_dropped_and_counted(samples, workers):
    whole = decodable(samples, small_processor(entry("whisper"), entry("sslam")), num_workers=workers)
    assert said(whole) == ["a", "c", "e"]
    assert whole.summary() == "3 samples of 7; dropped: 3 audio unreadable, 1 audio missing"
    details = {dropped.source: dropped.detail for dropped in whole.dropped}
    assert details["calls.jsonl:2"].startswith("calls.jsonl:2: audio file ")
    assert "broken.flac" in details["calls.jsonl:6"]
    assert "must hold finite samples within 2**31, got nan" in details["calls.jsonl:4"]


def test_processes_share_the_clips(samples):
    """Each decodes a part, and all come to the same samples."""
    parts: list[dict[int, str]] = []

    def gathered(own):
        parts.extend(own)
        return parts

    decodable(samples, small_processor(), place=(0, 2), gather=gathered)
    whole = decodable(samples, small_processor(), place=(1, 2), gather=gathered)
    assert said(whole) == ["a", "c", "e"]
    assert [len(part) for part in parts] == [0, 2]  # the first and third clip, the second and fourth


def test_none_is_left(samples):
    with pytest.raises(ValueError, match=r"samples must hold at least one whose clips can be read, got 0 samples of 2"):
        decodable(samples[1:2], small_processor())
