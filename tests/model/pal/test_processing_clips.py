"""Clips in every form in which datasets and decoders hand them over, each with its own rate."""

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, TOKENIZER, build_pal, entry, tone
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerFast

from palkernels.model import AudioError, PalConfig, PalProcessor


@dataclass
class Samples:
    """As torchcodec's AudioSamples."""

    data: Tensor  # (channels, samples)
    sample_rate: int
    pts_seconds: float = 0.0
    duration_seconds: float = 0.0


class Decoder:
    """As torchcodec's AudioDecoder, which datasets give."""

    def __init__(self, samples, seconds=None, fault=None):
        self.samples, self.fault, self.decoded = samples, fault, 0
        self.metadata = SimpleNamespace(duration_seconds=seconds, sample_rate=samples.sample_rate)

    def get_all_samples(self):
        self.decoded += 1
        if self.fault is not None:
            raise self.fault
        return self.samples


@pytest.fixture(scope="module")
def both():
    """The processor of a model with Whisper by PLITS and SSLAM by LAL, for clips of ten seconds and a million bytes."""
    return PalProcessor(TOKENIZER, [entry("whisper", "plits"), entry("sslam")], max_seconds=10, max_bytes=10**6)


def forms(rate):
    """One clip of 0.1 s in every form, with and without a rate of its own."""
    clip = tone(rate=rate)
    stereo = torch.stack([2 * clip, 0 * clip])  # its mean is exact
    with_rate = {
        "dict": {"array": clip.numpy(), "sampling_rate": rate, "path": None},
        "double": {"array": clip.double().numpy(), "sampling_rate": numpy.int64(rate)},
        "tensor": {"array": clip, "sampling_rate": rate, "bytes": None},
        "samples": Samples(clip[None], rate),
        "stereo": Samples(stereo, rate),
        "decoder": Decoder(Samples(stereo, rate), seconds=0.1),
        "no duration": Decoder(Samples(clip[None], rate)),
    }
    return clip, with_rate


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_every_form_is_the_array_at_its_rate(both, rate):
    array, with_rate = forms(rate)
    want = both(AUDIO_TOKEN, array, rate)
    for name, clip in with_rate.items():
        content = [{"type": "audio", "audio": clip}]
        got = {
            "call": both(AUDIO_TOKEN, clip),
            "a list": both([AUDIO_TOKEN], [clip]),
            "lists": both([AUDIO_TOKEN], [[clip]]),
            "another rate is for arrays alone": both(AUDIO_TOKEN, clip, 8_000),
            "chat": both.apply_chat_template([{"role": "user", "content": content}], "<|AUDIO|>", tokenize=True),
        }
        for way, batch in got.items():
            assert torch.equal(batch["input_ids"], want["input_ids"]), (name, way)
            assert all(map(torch.equal, batch["input_features"], want["input_features"])), (name, way)


def test_a_batch_of_different_rates(both):
    """Each clip is heard at its own rate, and bare arrays at that of the call."""
    clips = [
        {"array": tone(rate=44_100).numpy(), "sampling_rate": 44_100},
        tone(300, rate=8_000),
        Decoder(Samples(tone(500, 0.05, 48_000)[None], 48_000)),
    ]
    rates, texts = (44_100, 8_000, 48_000), [f"{AUDIO_TOKEN}{AUDIO_TOKEN}", AUDIO_TOKEN]
    bare = [clips[0]["array"], clips[1], clips[2].samples.data[0]]
    alone = [both(AUDIO_TOKEN, clip, rate) for clip, rate in zip(bare, rates, strict=True)]
    for audio in (clips, [clips[:2], clips[2:]]):
        got = both(texts, audio, 8_000)
        assert got["audio_index"].tolist() == [[0, 1], [2, -1]]
        assert torch.equal(got["audio_lengths"], torch.cat([one["audio_lengths"] for one in alone]))
        for tower in range(2):
            want = torch.cat([one["input_features"][tower] for one in alone])
            assert torch.equal(got["input_features"][tower], want)


class Column(Sequence):
    """As a column of a dataset: a sequence that is no list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.items[key]


def test_columns_of_a_dataset(both):
    clips, texts = [{"array": tone().numpy(), "sampling_rate": 16_000}, forms(8_000)[1]["decoder"]], [AUDIO_TOKEN] * 2
    chats = [[{"role": "user", "content": [{"type": "audio", "audio": clip}]}] for clip in clips]
    want = both(texts, clips)
    for got in (
        both(Column(texts), Column(clips)),
        both(Column(texts), Column([Column(clips[:1]), Column(clips[1:])])),
        both.apply_chat_template(Column(chats), "<|AUDIO|>", tokenize=True),
    ):
        assert torch.equal(got["input_ids"], want["input_ids"])
        assert all(map(torch.equal, got["input_features"], want["input_features"]))


def test_files_that_are_not_decoded(both, tmp_path):
    """As datasets with ``decode=False`` give them, by path or with their bytes."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((tone().numpy() * 30_000).astype("<i2").tobytes())
    want, held = both(AUDIO_TOKEN, tmp_path / "a.wav"), (tmp_path / "a.wav").read_bytes()
    for clip in (
        {"path": str(tmp_path / "a.wav"), "bytes": None},
        {"path": "a.wav", "bytes": held},
        {"path": None, "bytes": held},
        held,
    ):
        got = both(AUDIO_TOKEN, clip)
        assert all(map(torch.equal, got["input_features"], want["input_features"]))


SECOND = torch.zeros(1, 16_000)
REFUSED = {
    "no rate": ({"array": tone().numpy()}, r"an array and its sampling_rate, bytes or a path, got \['array'"),
    "bytes": ({"bytes": b"RIFF", "path": "a.wav"}, "audio file in memory must hold intact WAV, FLAC, OGG or MP3"),
    "no bytes": ({"bytes": b"", "path": "a.wav"}, "audio file in memory must hold audio, got an empty file"),
    "many bytes": (bytes(10**6 + 1), "audio file in memory must have at most 1000000 bytes, got 1000001"),
    "text for bytes": ({"bytes": "RIFF", "path": "a.wav"}, r"bytes or a path, got \['bytes', 'path'\]"),
    "an address": ({"url": "https://example.org"}, r"bytes or a path, got \['url'\]"),
    "a list": ({"array": [0.1], "sampling_rate": 16_000}, "audio must be a NumPy array, a tensor or a path, got list"),
    "rank 2": ({"array": SECOND, "sampling_rate": 16_000}, r"must have shape \(samples,\), one channel, got \(1, 1"),
    "a float rate": ({"array": tone(), "sampling_rate": 16e3}, "sampling_rate must be an integer, got 16000.0"),
    "long": (Samples(SECOND.expand(1, 16_000).repeat(1, 11), 16_000), "must be at most 10 s long, got 11.00 s"),
    "long by its header": (Decoder(Samples(SECOND, 16_000), 1e9), "got 1000000000.00 s by its header"),
    "undecodable": (Decoder(Samples(SECOND, 1), fault=RuntimeError("bad\nframe")), "must be decodable, got bad"),
    "flat": (Samples(SECOND[0], 16_000), r"a float tensor \(channels, samples\), got \(16000,\) of torch.float32"),
    "integers": (Samples(SECOND.short(), 16_000), r"\(channels, samples\), got \(1, 16000\) of torch.int16"),
    "no tensor": (Samples([[0.1]], 16_000), r"\(channels, samples\), got list"),
    "wide": (Samples(torch.zeros(65, 10), 16_000), "must have 1 to 64 channels, got 65"),
    "large": (Samples(torch.zeros(64, 1).expand(64, 10**9), 16_000), "must have at most 1000000 bytes"),
    "empty": (Samples(torch.zeros(1, 0), 16_000), "must hold at least one sample, got none"),
    "nan": (Samples(torch.full((2, 9), torch.nan), 16_000), "must hold finite samples"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(both, name):
    clip, message = REFUSED[name]
    with pytest.raises(AudioError, match=message) as caught:
        both(AUDIO_TOKEN, clip)
    assert "\n" not in str(caught.value)
    if name == "long by its header":
        assert clip.decoded == 0


def test_entries_may_leave_out_what_a_config_fills_in(tmp_path):
    """As written for PalConfig: the processor is that of the model with this config."""
    entries = [{"type": "sslam", "connector": {"type": "mlp"}}]
    entries += [{"type": ["sslam", "clap"], "integration": "plits", "connector": {"type": "lfst"}}]
    config = PalConfig(text_config=build_pal(entry("sslam")).config.text_config, encoders=entries, audio_token_id=2)
    processor, whole = PalProcessor(TOKENIZER, entries), PalProcessor.from_config(TOKENIZER, config)
    got, want = (one(f"a{AUDIO_TOKEN}", tone(), 16_000) for one in (processor, whole))
    assert set(got) == set(want)
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert all(map(torch.equal, got["input_features"], want["input_features"]))
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(f"a{AUDIO_TOKEN}", tone(), 16_000)["input_ids"], got["input_ids"])
    assert entries[0] == {"type": "sslam", "connector": {"type": "mlp"}}  # the caller's stay as they are
    with pytest.raises(ValueError, match="an encoder's type must be"):
        PalProcessor(TOKENIZER, [{"type": "owl", "connector": {"type": "mlp"}}])


def words(*more):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", "a", *more])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def test_an_audio_token_that_the_tokenizer_lacks(tmp_path):
    config = build_pal(entry("sslam", "plits"), audio_token_id=3).config
    message = (
        r"as one token, got none: from_config\(add_audio_token=True\) or tokenizer.add_tokens\(\['<\|AUDIO\|>'\], sp"
    )
    with pytest.raises(ValueError, match=message):
        PalProcessor.from_config(words(), config)
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    processor = PalProcessor.from_config(tokenizer, config, add_audio_token=True)
    assert processor.audio_token_id == 3
    assert processor(f"a{AUDIO_TOKEN}", tone(), 16_000)["input_ids"].tolist() == [[2, *[3] * 8]]
    assert tokenizer.decode([2, 3], skip_special_tokens=True) == "a"
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).audio_token_id == 3
    assert len(tokenizer) == 4
    assert PalProcessor.from_config(tokenizer, config, add_audio_token=True).audio_token_id == 3
    assert len(tokenizer) == 4  # not a second time
    with pytest.raises(ValueError, match="the audio token must have the id 3 as in the config, got 4"):
        PalProcessor.from_config(words("b"), config, add_audio_token=True)
    lal = build_pal(entry("sslam")).config  # no placeholder ever reaches the model
    assert PalProcessor.from_config(words("b"), lal, add_audio_token=True).audio_token_id == 4
    with pytest.raises(ValueError, match="must know '<sound>' as one token"):
        PalProcessor.from_config(words(), lal, audio_token="<sound>")
    assert PalProcessor.from_config(words(), lal, audio_token="<sound>", add_audio_token=True).audio_token_id == 3


def test_the_folder_of_a_clip_is_no_message(both):
    """A path that holds the audio token is a clip's, not a text."""
    content = [{"type": "audio", "path": Path(f"/nowhere/{AUDIO_TOKEN}.wav")}]
    assert both.apply_chat_template([{"role": "user", "content": content}]) == f"user: {AUDIO_TOKEN}\n"
