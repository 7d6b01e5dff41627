"""States of frozen encoders on disk: the same as what the encoders give, whole after every interruption."""

import contextlib
import os
import pickle
import random
import signal
import time

import pytest
import torch
from support.audio_llm import INTEGRATIONS, build_pal, entry, forbid_towers, open_gates, processor_of
from support.processes import FORKED
from support.samples import TEMPLATE, encode_when_told, model_and_processor, sample, write_clip
from torch.utils.data import DataLoader

from palkernels.model import AudioError
from palkernels.model.data.collator import Collator
from palkernels.model.data.states import EncodedStates

WAYS = INTEGRATIONS | {"stacked": ([entry("whisper", "plits")], {})}


@pytest.fixture
def samples(tmp_path):
    """With one clip, none, two; one is heard twice, and one is of several windows of SSLAM."""
    clips = [write_clip(tmp_path / f"{i}.wav", seconds, 300 + i) for i, seconds in enumerate((0.1, 0.05, 10.5))]
    return [
        sample(clips[:1], "a", "red"),
        sample([], "b", "no"),
        sample(clips[1:], "c"),
        sample(clips[:1], "d", "blue"),
    ]


def files_in(folder, pattern="*.states"):
    return sorted(folder.rglob(pattern))


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_those_of_the_clips(way, samples, tmp_path):
    encoders, settings = WAYS[way]
    model, processor = model_and_processor(*encoders, dtype=torch.float64, **settings)
    open_gates(model).train()
    results = []
    states = EncodedStates(tmp_path / "states", model.audio_tower, processor)
    prepared = states.prepare(samples)
    assert list(prepared.samples) == samples
    assert (prepared.encoded, prepared.kept) == (3, 0)
    assert prepared.bytes == sum(path.stat().st_size for path in files_in(tmp_path / "states"))
    for collate in (Collator(processor), Collator(processor, states=states)):
        batch = collate(samples)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(w.grad for w in model.parameters() if w.grad is not None)])
        forbid_towers(model)
    assert "input_features" not in batch
    assert len(results[0]) == len(results[1]) > 2
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_kept_bitwise(dtype, samples, tmp_path):
    """Of a clip that is encoded alone, up to what is valid."""
    model, processor = model_and_processor(entry("whisper"), entry("sslam"), dtype=dtype)
    states = EncodedStates(tmp_path / "states", model.audio_tower, processor)
    states.prepare(samples, batch_size=1)
    for clip in {*samples[0].clips(), *samples[2].clips()}:
        features, lengths = processor.audio_features([clip])
        kept, valid = states.of_clips([clip])
        assert torch.equal(valid, lengths)
        for tower, windows, tower_states in zip(model.audio_tower, features, kept, strict=True):
            want = torch.cat([tower(window[None]) for window in windows])
            assert tower_states.dtype == want.dtype == dtype
            assert tower_states.shape[1] < want.shape[1] or len(want) > 1
            for got, expected in zip(tower_states[:-1], want[:-1], strict=True):
                assert torch.equal(got, expected[: len(got)])
            last = tower_states[-1][tower_states[-1].abs().sum(dim=-1) > 0]
            assert torch.equal(last, want[-1][: len(last)])


def test_another_dtype(samples, tmp_path):
    model, processor = model_and_processor(entry("whisper"))
    exact = EncodedStates(tmp_path / "states", model.audio_tower, processor)
    half = EncodedStates(tmp_path / "states", model.audio_tower, processor, dtype=torch.float16)
    sizes = [states.prepare(samples).bytes for states in (exact, half)]
    assert sizes[1] < 0.6 * sizes[0]
    (got,), (want,) = half.of_clips(samples[0].clips())[0], exact.of_clips(samples[0].clips())[0]
    assert torch.equal(got, want.half())
    with torch.no_grad():
        for weight in model.audio_tower.parameters():
            weight.mul_(1e5)
    large = EncodedStates(tmp_path / "states", model.audio_tower, processor, dtype=torch.float16)
    large.towers[0].encoder.layer_norm.weight.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"dtype must hold all states, got torch\.float16 for"):
        large.prepare(samples)
    with pytest.raises(TypeError, match=r"dtype must be float16, bfloat16, float32 or None, got torch\.int8"):
        EncodedStates(tmp_path, model.audio_tower, processor, dtype=torch.int8)


def test_what_is_encoded_again(samples, tmp_path):
    """Another clip under the same name; another weight, setting or dtype of an encoder. Not another connector, name,
    or place of a clip."""
    folder = tmp_path / "states"

    def encoded(samples=samples, change=None, dtype=None, **config):
        whisper = entry("whisper")
        model, processor = model_and_processor({**whisper, "config": whisper["config"] | config})
        if change is not None:
            change(model)
        return EncodedStates(folder, model.audio_tower, processor, dtype=dtype).prepare(samples).encoded

    assert encoded() == 3
    assert encoded() == 0
    assert encoded(change=lambda model: next(model.multi_modal_projector.parameters()).data.add_(1.0)) == 0
    assert encoded(change=lambda model: next(model.audio_tower.parameters()).data.view(-1)[:1].add_(1.0)) == 3
    assert encoded(change=lambda model: model.audio_tower.bfloat16()) == 3
    assert encoded(dtype=torch.float16) == 3
    assert encoded(encoder_layers=2) == 3
    moved = tmp_path / "moved" / "clip.wav"
    moved.parent.mkdir()
    moved.write_bytes((tmp_path / "0.wav").read_bytes())
    assert encoded([sample([moved])]) == 0
    write_clip(tmp_path / "0.wav", 0.1, 700)
    assert encoded() == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_file_is_made_again(damage, samples, tmp_path):
    model, processor = model_and_processor(entry("whisper"), entry("sslam"))
    states = EncodedStates(tmp_path / "states", model.audio_tower, processor)
    states.prepare(samples)
    want = Collator(processor, states=states)(samples)
    path = files_in(tmp_path / "states")[1]
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:100], "empty": b"", "flipped": flipped}[damage])
    in_workers = DataLoader(samples, 4, collate_fn=Collator(processor, states=states), num_workers=1)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*states of every clip must be kept in .*prepare\(samples\)"):
        next(iter(in_workers))
    got = Collator(processor, states=states)(samples)
    for one, other in zip(got["encoder_states"], want["encoder_states"], strict=True):
        torch.testing.assert_close(one, other)
    assert states.prepare(samples).encoded == 0
    assert len(path.read_bytes()) == len(content)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_read_without_the_encoders(method, samples, tmp_path):
    model, processor = model_and_processor(entry("whisper"))
    states = EncodedStates(tmp_path / "states", model.audio_tower, processor)
    states.prepare(samples, num_workers=1)
    collate = Collator(processor, states=states)
    assert pickle.loads(pickle.dumps(collate)).states.towers is None
    loader = DataLoader(samples, 2, collate_fn=collate, num_workers=2, multiprocessing_context=method)
    for got, want in zip(loader, [collate(samples[:2]), collate(samples[2:])], strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert torch.equal(got[name], want[name]), name


def test_clips_that_cannot_be_decoded_are_dropped(samples, tmp_path):
    import soundfile

    broken = tmp_path / "broken.flac"
    soundfile.write(broken, *soundfile.read(tmp_path / "0.wav"))
    content = bytearray(broken.read_bytes())
    content[-600:-500] = bytes(100)
    broken.write_bytes(content)
    model, processor = model_and_processor(entry("whisper"))
    states = EncodedStates(tmp_path / "states", model.audio_tower, processor)
    more = [sample([broken], source="b.jsonl:7"), *samples, sample([tmp_path / "gone.wav"], source="b.jsonl:8")]
    for encoded in (3, 0):
        prepared = states.prepare(more)
        assert prepared.encoded == encoded
        assert list(prepared.samples) == samples
        assert [(row.source, row.reason) for row in prepared.samples.dropped] == [
            ("b.jsonl:7", "audio unreadable"), ("b.jsonl:8", "audio unreadable"),
        ]  # fmt: skip
    assert prepared.samples.dropped[0].detail.startswith("b.jsonl:7: audio file ")
    with pytest.raises(ValueError, match="samples must hold at least one whose clips can be read, got 0 samples of 1"):
        states.prepare(more[:1])
    with pytest.raises(AudioError, match=r"^b\.jsonl:7: audio file"):
        Collator(processor, states=states)(more[:1])


@contextlib.contextmanager
def encoding(folder):
    """A process that is about to encode a folder's clips, and the connection by which it is told to."""
    here, there = FORKED.Pipe()
    process = FORKED.Process(target=encode_when_told, args=(folder, there))
    process.start()
    there.close()
    assert here.recv() == "ready"
    try:
        yield process, here
    finally:
        process.kill()
        process.join()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a system without Unix signals")
def test_killed_at_any_moment(tmp_path):
    """What is there is whole, and two later ones, at the same time, encode what is missing."""
    for i in range(24):
        write_clip(tmp_path / "clips" / f"{i:02}.wav", 0.05 + i / 100, 300 + i)
    folder, chance = tmp_path / "states", random.Random(0)
    model, processor = model_and_processor(entry("whisper"), entry("sslam"))
    mine = EncodedStates(folder, model.audio_tower, processor)
    names = {files.folder: files for files in mine.files}
    before = 0
    for _ in range(3):
        with encoding(tmp_path) as (one, told):
            told.send("now")
            while len(files_in(folder)) <= before:  # it is in the midst of them
                time.sleep(0.002)
            time.sleep(chance.random() * 0.1)
            one.kill()
        whole = files_in(folder)
        assert len(whole) > before
        before = len(whole)
        for path in whole:
            assert names[path.parents[1]].load(path.stem) is not None
    assert before < 48
    with encoding(tmp_path) as (_, one), encoding(tmp_path) as (_, other):
        for told in (one, other):
            told.send("now")
        assert all(told.recv() > 0 for told in (one, other))
    clips = [str(path) for path in sorted((tmp_path / "clips").iterdir())]
    assert len(files_in(folder)) == 48
    kept, lengths = mine.of_clips(clips)
    fresh = EncodedStates(tmp_path / "fresh", model.audio_tower, processor)
    want, expected = fresh.of_clips(clips)
    assert torch.equal(lengths, expected)
    for got, states in zip(kept, want, strict=True):
        torch.testing.assert_close(got, states)
    for path in files_in(folder, "*.tmp"):
        os.utime(path, (0, 0))
    mine.prepare([sample(clips[:1])])
    assert files_in(folder, "*.tmp") == []


def test_encoders_that_are_refused(samples, tmp_path):
    model, processor = model_and_processor(entry("whisper"))
    other = build_pal(entry("sslam"))
    with pytest.raises(ValueError, match="towers must be the processor's, whisper, got SslamTower"):
        EncodedStates(tmp_path, other.audio_tower, processor)
    states = EncodedStates(tmp_path, model.audio_tower, processor)
    with pytest.raises(ValueError, match="states must be of the processor's encoders"):
        Collator(processor_of(other, chat_template=TEMPLATE), states=states)
    training, processor = model_and_processor(entry("whisper"), freeze_encoders=False)
    with pytest.raises(ValueError, match="towers must be frozen for their states to be kept"):
        EncodedStates(tmp_path, training.audio_tower, processor)
