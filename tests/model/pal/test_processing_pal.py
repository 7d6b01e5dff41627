"""What a processor makes of texts and clips, and what it refuses."""

import copy
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy
import pytest
import torch
from support import hostile
from support.audio_llm import AUDIO_ID, AUDIO_TOKEN, TOKENIZER, build_pal, entry, processor_of, tone
from support.hostile import HOSTILE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from palkernels.model import AudioError, PalConfig, PalProcessor, load_audio
from palkernels.model.audio.waveforms import waveform


@pytest.fixture(scope="module")
def both():
    """The processor of a model with Whisper by PLITS and SSLAM by LAL."""
    return processor_of(build_pal(entry("whisper", "plits"), entry("sslam")))


@pytest.fixture(scope="module")
def lal():
    return processor_of(build_pal(entry("whisper")))


def write_wav(path, samples, rate=16_000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((numpy.asarray(samples) * 32767).astype("<i2").repeat(channels).tobytes())


def texts_of(batch):
    return [
        TOKENIZER.decode(ids[mask != 0]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_markers_become_placeholders_and_places(both, lal):
    texts = [f"hear {AUDIO_TOKEN}: what?", f"{AUDIO_TOKEN}{AUDIO_TOKEN} or", "none"]
    audio = [tone(), tone(200, 0.04), tone(300, 0.02)]
    found = both(texts, audio, 16_000)
    assert texts_of(found) == [f"hear {AUDIO_TOKEN * 5}: what?", f"{AUDIO_TOKEN * 3} or", "none"]
    assert found["insert_at"].tolist() == [[5, 0], [0, 2], [0, 0]]  # before the clip's placeholders
    assert found["audio_index"].tolist() == [[0, -1], [1, 2], [-1, -1]]
    assert found["audio_lengths"].tolist() == [[5, 8], [2, 8], [1, 8]]
    assert [x.shape[0] for x in found["input_features"]] == [3, 3]
    assert found["attention_mask"][2].tolist() == [0] * 13 + [1] * 4  # padded on the left
    alone = lal(texts, audio, 16_000)
    assert texts_of(alone) == ["hear : what?", " or", "none"]
    assert alone["insert_at"].tolist() == [[5, 0], [0, 0], [0, 0]]
    assert alone["input_features"].shape == (3, 80, 3000)


def test_a_directory_without_the_processors_settings(tmp_path):
    """As where the model alone was saved, beside its tokenizer."""
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoders must be given, got none: .* writes processor_config\.json"):
        PalProcessor.from_pretrained(tmp_path)


def test_text_alone(both):
    assert set(both(["one", "three"])) == {"input_ids", "attention_mask"}
    assert both("one", padding_side="right", pad_to_multiple_of=8)["attention_mask"].tolist() == [[1] * 3 + [0] * 5]


def test_numbers_of_placeholders():
    for connector, settings, count in (("mlp", {}, 16), ("qformer", {}, 5)):
        processor = processor_of(build_pal(entry("sslam", "plits", connector), **settings))
        found = processor(AUDIO_TOKEN, tone(seconds=0.2), 16_000)
        assert int((found["input_ids"] == AUDIO_ID).sum()) == count
    processor = processor_of(build_pal(entry("sslam"), summary_tokens=4))
    assert texts_of(processor(f"a{AUDIO_TOKEN}", tone(), 16_000)) == [f"a{AUDIO_TOKEN * 4}"]


def test_clips_for_each_text_or_in_one_list(both):
    texts, (a, b, c) = [f"{AUDIO_TOKEN}{AUDIO_TOKEN}", f"{AUDIO_TOKEN}"], (tone(), tone(200), tone(300))
    flat, nested = both(texts, [a, b, c], 16_000), both(texts, [[a, b], [c]], 16_000)
    assert all(torch.equal(x, y) for x, y in zip(flat["input_features"], nested["input_features"], strict=True))
    assert torch.equal(flat["audio_index"], nested["audio_index"])
    again = both(texts, [[a, b], [a]], 16_000)
    assert again["audio_index"].tolist() == [[0, 1], [0, -1]]  # one object, encoded once
    with pytest.raises(ValueError, match=r"audio must hold a clip for each <\|AUDIO\|> in the text, 3, got 2"):
        both(texts, [a, b], 16_000)
    with pytest.raises(ValueError, match=r"in the text, \[2, 1\], got \[1, 2\]"):
        both(texts, [[a], [b, c]], 16_000)
    with pytest.raises(ValueError, match="in the text, 1, got 0"):
        both(AUDIO_TOKEN)
    with pytest.raises(ValueError, match="in the text, 0, got 1"):
        both("none", a, 16_000)
    for numbers in ([0.1, 0.2], [[0.1, 0.2]], a.tolist()):
        with pytest.raises(AudioError, match="audio must be a NumPy array, a tensor or a path, got a list of numbers"):
            both(AUDIO_TOKEN, numbers, 16_000)
    for pair in ((a.numpy(), 16_000), (16_000, a), [(a, 16_000)], [(a, 16_000), (b, 16_000)]):
        with pytest.raises(AudioError, match=r'audio must be a dict {"array": .*, got an array and its rate as a pair'):
            both([AUDIO_TOKEN] * 2, pair)
    rows = torch.stack([a, a])
    for several in (rows, rows.numpy(), [rows]):
        with pytest.raises(
            AudioError, match=r"\(samples,\), one channel, got \(2, 1600\): list\(audio\) is one clip per row"
        ):
            both([AUDIO_TOKEN] * 2, several, 16_000)
    assert both([AUDIO_TOKEN] * 2, list(rows), 16_000)["audio_index"].tolist() == [[0], [1]]


def test_messages_in_place_of_a_text(both):
    messages = [{"role": "user", "content": "hi"}]
    for given in (messages, [messages]):
        with pytest.raises(ValueError, match=r"must be a string or a list of them, got \['(dict|list)'\]: apply_chat_"):
            both(given)


def test_rates_and_kinds_of_clips(lal, tmp_path):
    """Arrays, tensors and files of any rate become what load_audio makes of a file."""
    sound = tone(seconds=0.3, rate=44_100).double() * 0.5
    write_wav(tmp_path / "a.wav", sound, 44_100)
    want = load_audio(tmp_path / "a.wav")
    for clip in (sound, sound.numpy(), sound.float(), sound.half().numpy(), sound.flip(0).numpy()[::-1]):
        found = waveform(clip, 44_100, 16_000, max_seconds=1, max_bytes=10**6)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, want, rtol=0, atol=1e-3)
    files = [lal(AUDIO_TOKEN, path)["input_features"] for path in (tmp_path / "a.wav", str(tmp_path / "a.wav"))]
    assert torch.equal(files[0], files[1])
    clap = processor_of(build_pal(entry("clap"), entry("sslam")))
    found = clap(AUDIO_TOKEN, tmp_path / "a.wav")
    assert found["audio_lengths"].tolist() == [[2, 16]]  # at 48 and 16 kHz


def test_chat(both, tmp_path):
    write_wav(tmp_path / "a.wav", tone())
    messages = [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": [{"type": "audio", "path": tmp_path / "a.wav"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A tone."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "audio", "audio": tone(300).numpy()}]},
    ]
    text = both.apply_chat_template(messages, add_generation_prompt=True)
    assert text == f"system: Listen.\nuser: {AUDIO_TOKEN}What?\nassistant: A tone.\nuser: And{AUDIO_TOKEN}\nassistant: "
    found = both.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, sampling_rate=16_000)
    assert texts_of(found) == [text.replace(AUDIO_TOKEN, AUDIO_TOKEN * 5)]
    several = both.apply_chat_template([messages[:2], messages], tokenize=True, sampling_rate=16_000)
    assert several["audio_index"].tolist() == [[0, -1], [0, 1]]
    own = PalProcessor(TOKENIZER, both.encoders, chat_template="{{ messages[0]['content'] }}!")
    assert own.apply_chat_template(messages[1:2]) == f"{AUDIO_TOKEN}What?!"
    for content in ([{"type": "image", "url": "x"}], [{"type": "audio"}], f"say {AUDIO_TOKEN}"):
        with pytest.raises(ValueError, match='content must be "text", or "audio" with an array or a path, got'):
            both.apply_chat_template([{"role": "user", "content": content}])
    item = {"type": "audio", "audio_url": "https://example.org/a.wav"}
    with pytest.raises(AudioError, match=r"a file on this machine, got the address"):
        both.apply_chat_template([{"role": "user", "content": [item]}], tokenize=True)


def test_a_beginning_is_not_added_twice(both, tmp_path):
    """A tokenizer that begins every text with BOS, as Llama's does, begins no text with two."""
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, bos_token="<s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    template = "<s>{{ messages[0]['content'] }}"
    processor = PalProcessor(tokenizer, both.encoders, chat_template=template)
    item = {"type": "audio", "audio": tone()}
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, item]}]
    for found in (
        processor(f"a{AUDIO_TOKEN}", tone(), 16_000),
        processor(f"<s>a{AUDIO_TOKEN}", tone(), 16_000),
        processor.apply_chat_template(chat, tokenize=True, sampling_rate=16_000),
    ):
        assert (found["input_ids"] == bos).sum() == 1
        assert found["insert_at"].tolist() == [[2]]
    plain = PalProcessor(tokenizer, both.encoders, chat_template="{{ messages[0]['content'] }}")
    found = plain.apply_chat_template(chat, tokenize=True, sampling_rate=16_000)
    assert found["insert_at"].tolist() == [[1]]  # a template says all there is to say
    assert processor(f"a{AUDIO_TOKEN}", tone(), 16_000, add_special_tokens=False)["insert_at"].tolist() == [[1]]


def test_a_text_that_begins_with_bos_gets_no_other(both):
    """This holds for each text, whatever stands before it in the batch."""
    processor = copy.deepcopy(both)
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    for texts in (["<s>a", "b"], ["b", "<s>a"]):
        ids = processor(texts)["input_ids"]
        assert (ids == bos).sum(dim=1).tolist() == [1, 1]


def test_save_and_load(both, tmp_path):
    PalProcessor(TOKENIZER, both.encoders, 0, chat_template="{{ messages }}", max_seconds=2.5).save_pretrained(tmp_path)
    again = PalProcessor.from_pretrained(tmp_path)
    assert (again.encoders, again.max_seconds, again.chat_template) == (both.encoders, 2.5, "{{ messages }}")
    found, want = again(f"a{AUDIO_TOKEN}b", tone(), 16_000), both(f"a{AUDIO_TOKEN}b", tone(), 16_000)
    assert set(found) == set(want) == {*both.model_input_names}
    assert torch.equal(found["input_ids"], want["input_ids"])


def test_the_tokenizer_must_know_the_token(both, tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer must know '<sound>' as one token"):
        PalProcessor(AutoTokenizer.from_pretrained(tmp_path), both.encoders, audio_token="<sound>")
    config = build_pal(entry("sslam", "plits")).config
    changed = PalConfig(**{**config.to_dict(), "audio_token_id": 7})
    with pytest.raises(ValueError, match="the audio token must have the id 7 as in the config, got 2"):
        PalProcessor.from_config(TOKENIZER, changed)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays(name):
    clip, rate, message = HOSTILE[name]
    processor = hostile.processor()
    with pytest.raises(AudioError, match=message) as caught:
        processor(AUDIO_TOKEN, clip, rate)
    assert "\n" not in str(caught.value)


def test_hostile_files(both, tmp_path):
    write_wav(tmp_path / "long.wav", numpy.zeros(16_000 * 11))
    write_wav(tmp_path / "wide.wav", numpy.zeros(10), channels=65)
    write_wav(tmp_path / "slow.wav", numpy.zeros(10), rate=999)
    (tmp_path / "no.wav").write_bytes(b"RIFF and nothing else")
    short = PalProcessor(TOKENIZER, both.encoders, max_seconds=10.5)
    small = PalProcessor(TOKENIZER, both.encoders, max_bytes=1000)
    for processor, name, message in (
        (short, "long.wav", "must be at most 10.5 s long, got 11.00 s by its header"),
        (both, "wide.wav", "must have 1 to 64 channels, got 65"),
        (both, "slow.wav", "must have a sampling rate of 1000 to 768000 Hz, got 999 Hz"),
        (both, "no.wav", "must hold intact WAV, FLAC, OGG or MP3 audio"),
        (both, "none.wav", "must exist, got no such file"),
        (small, "long.wav", "must have at most 1000 bytes, got 352044"),
    ):
        with pytest.raises(AudioError, match=message) as caught:
            processor(AUDIO_TOKEN, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_hostile_clips_take_no_memory(tmp_path):
    """Refusing all of them adds little to the peak of a process that has processed one clip."""
    path = os.pathsep.join([str(Path(hostile.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, "-m", "support.hostile"], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "accepted" not in done.stdout
    assert int(done.stdout) < 256 * 2**20
