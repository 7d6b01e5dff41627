"""What a request's clips must be, and how many tokens they become, known before anything is encoded."""

import re

import numpy as np
import pytest
import torch
from support.served import WIDTH, make, sound

from palkernels.model import AudioError, PalConfig, PalProcessor
from palkernels.model.vllm import clips


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    made = {}
    for name in ("lal", "encoders", "unified"):
        directory = make(tmp_path_factory.mktemp(name), name)
        made[name] = PalProcessor.from_pretrained(directory), PalConfig.from_pretrained(directory)
    return made


@pytest.mark.parametrize("name", ["lal", "encoders", "unified"])
@pytest.mark.parametrize("seconds", [0.01, 0.5, 2, 2.01, 6.3])
def test_tokens_and_windows_are_known_from_samples(processors, name, seconds):
    processor, config = processors[name]
    samples = round(16_000 * seconds)
    features, lengths = processor.audio_features([torch.from_numpy(sound(seconds))], 16_000)
    (tokens,) = clips.token_counts(processor, lengths)
    assert clips.tokens_of_samples(processor, samples, 16_000) == tokens
    assert clips.window_counts(processor, lengths).tolist() == [[len(windows) for windows in features]]
    ways = sum(config.uses(way) for way in ("lal", "plits"))
    assert tokens >= ways


def test_the_longest_clip_is_bounded_by_the_processor_and_by_the_context(processors):
    processor, _ = processors["lal"]  # 50 states a second, 4 of them joined
    assert clips.longest_seconds(processor, 100) == pytest.approx(8, abs=0.2)
    assert clips.longest_seconds(processor, 10**9) == processor.longest_clip
    clips.check_length(processor, 16_000 * 8, 16_000, 101)
    with pytest.raises(AudioError, match=r"at most 100 tokens, about 8\.\d s, so that max_model_len 101 holds"):
        clips.check_length(processor, 16_000 * 9, 16_000, 100)
    bounded = PalProcessor(processor.tokenizer, processor.encoders, max_seconds=3.0)
    with pytest.raises(AudioError, match=r"at most 3 s long, the processor's max_seconds, got 3\.50 s"):
        clips.check_length(bounded, 3500, 1000, 100)


@pytest.mark.parametrize(
    ("clip", "message"),
    [("a.wav", "got str"), ((sound(0.1), 1.5), "got 1.5"), (np.zeros((2, 3)), "one channel")],
    ids=["a path", "half a hertz", "two channels"],
)  # fmt: skip
def test_what_is_no_clip(clip, message):
    with pytest.raises(AudioError, match=message):
        clips.read_clip(clip, 16_000)


def test_states_of_two_ways_are_refused(processors):
    states = torch.zeros(3, WIDTH)
    clips.check_embeds(processors["unified"][1], [states], 20)
    with pytest.raises(AudioError, match="1 to 2 tokens, got 3"):  # a summary has 5
        clips.check_embeds(processors["unified"][1], [states], 7)
    with pytest.raises(AudioError, match="enters in one way"):
        clips.check_embeds(processors["encoders"][1], [states], 20)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.full((2, WIDTH), 1e300, dtype=torch.float64), "within 10,000 of 0, got 1e+300"),
        (torch.full((2, WIDTH), 3e38), "within 10,000 of 0, got 3e+38"),
        (torch.full((2, WIDTH), torch.nan), "got NaN or infinity"),
        (torch.zeros(2, WIDTH).to(torch.float8_e4m3fn), "must be floats"),
        (torch.zeros(2, WIDTH, requires_grad=True), "without gradients"),
        (torch.zeros(2, WIDTH, device="meta"), "on the CPU"),
        (torch.zeros(2, WIDTH).to_sparse(), "must be a plain tensor"),
        (torch.zeros(2, WIDTH, dtype=torch.int64), "must be floats"),
        (torch.zeros(WIDTH), "must be floats"),
        (torch.zeros(0, WIDTH), "1 to 20 tokens, got 0"),
    ],
)
def test_states_that_are_refused(processors, states, message):
    """What overflows in a layer would spoil the cache's blocks for whoever gets them next."""
    with pytest.raises(AudioError, match=re.escape(message)):
        clips.check_embeds(processors["lal"][1], [states], 20)
