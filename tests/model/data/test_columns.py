"""Datasets with an Audio column: in memory, saved, and in parquet files."""

import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch
from support.samples import said, small_processor, write_clip

from palkernels.model.data.collator import Collator
from palkernels.model.data.columns import StoredClip
from palkernels.model.data.reading import read
from palkernels.model.data.schemas import check, faults
from palkernels.model.data.sources import Source

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="reads what the package datasets makes: pip install datasets"
)


@pytest.fixture
def clips(tmp_path):
    return [str(write_clip(tmp_path / "clips" / f"{i}.wav", 0.1 + i / 50, 300 + 100 * i)) for i in range(3)]


def dataset_of(columns, **features):
    import datasets

    types = {name: datasets.Audio() if feature == "audio" else feature for name, feature in features.items()}
    dataset = datasets.Dataset.from_dict(columns)
    for name, feature in types.items():
        dataset = dataset.cast_column(name, feature)
    return dataset


def questions(clips):
    return {"question": ["a?", "b?", "c?"], "audio": clips, "answer": ["red", "blue", "green"]}


@needs_datasets
@pytest.mark.parametrize("form", ["memory", "saved", "saved dict", "parquet", "parquet folder"])
def test_every_form(form, clips, tmp_path):
    """Clips that the files hold are read from them, also by another process, where the WAV files are gone."""
    import datasets

    dataset = dataset_of(questions(clips), audio="audio")
    path, name = tmp_path / "made", "made"
    if form == "memory":
        path, name = dataset, "dataset"
    elif form == "saved":
        dataset.save_to_disk(path)
    elif form == "saved dict":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(path)
    else:
        columns = questions([{"bytes": Path(clip).read_bytes(), "path": "a.wav"} for clip in clips])
        dataset = dataset_of(columns, audio="audio")
        path.mkdir()
        for i in range(3):
            dataset.select([i]).to_parquet(path / f"{i}.parquet")
        if form == "parquet":
            path, name = path / "0.parquet", "0.parquet"
    want = Collator(small_processor())(read(Source(dataset)))
    for clip in clips if form != "memory" else ():
        Path(clip).unlink()
    samples = read(Source(path, split="train" if form == "saved dict" else None))
    assert said(samples) == (["red"] if form == "parquet" else ["red", "blue", "green"])
    name += "/train" if form == "saved dict" else ""
    assert [one.source for one in samples] == [f"{name}:row {i}" for i in range(len(samples))]
    asked = samples[0].messages[0]["content"]
    assert [part["type"] for part in asked] == ["audio", "text"]
    assert asked[1]["text"] == "a?"
    assert samples.seconds(samples[0]) == pytest.approx(0.1)
    if form != "memory":
        assert isinstance(asked[0]["audio"], StoredClip)
        samples = pickle.loads(pickle.dumps(samples))
    batch = Collator(small_processor())(list(samples))
    assert torch.equal(batch["input_features"], want["input_features"][: len(samples)])


@needs_datasets
def test_speech_without_a_question(clips):
    dataset = dataset_of({"speech": clips, "transcription": ["red", "", "green"], "id": [1, 2, 3]}, speech="audio")
    with pytest.raises(ValueError, match="must have a column for question, which columns names, or question asks"):
        read(Source(dataset))
    samples = read(Source(dataset, question="What is said?", task="speech"))
    assert said(samples) == ["red", "green"]
    assert samples[0].messages[0]["content"][1]["text"] == "What is said?"
    assert samples[0].task == "speech"
    assert [(row.source, row.reason) for row in samples.dropped] == [("dataset:row 1", "no answer")]


@needs_datasets
def test_classes(clips):
    """A class's name is the answer, and all names are the choices."""
    import datasets

    columns = {"audio": clips, "label": [1, 0, None]}
    dataset = dataset_of(columns, audio="audio", label=datasets.ClassLabel(names=["bell", "dog"]))
    samples = read(Source(dataset, question="What is it?"))
    assert said(samples) == ["dog", "bell"]
    assert samples[0].choices == ("bell", "dog")
    assert samples.reasons() == {"no answer": 1}


@needs_datasets
def test_columns_of_other_names(clips):
    columns = {"sound": clips, "ask": ["a?"] * 3, "say": ["red"] * 3, "kind": ["x", "y", ""], "text": ["no"] * 3}
    dataset = dataset_of(columns)  # paths, which are relative to nothing
    names = {"audio": "sound", "question": "ask", "answer": "say", "task": "kind"}
    samples = read(Source(dataset, columns=names))
    assert said(samples) == ["red"] * 3
    assert [one.task for one in samples] == ["x", "y", ""]
    assert samples[1].clips() == (clips[1],)
    with pytest.raises(ValueError, match="columns must be among sound, ask, say, kind, text, got gone"):
        read(Source(dataset, columns={"audio": "gone"}))
    with pytest.raises(ValueError, match=r"columns must be of audio, question, answer, .* got sound"):
        read(Source(dataset, columns={"sound": "audio"}))
    with pytest.raises(ValueError, match="dataset must have a column for audio, question"):
        read(Source(dataset))


@needs_datasets
def test_conversations_with_several_clips(clips):
    import datasets

    asked = {"role": "user", "content": "<audio>or<audio>?"}
    turns = [[asked, {"role": "assistant", "content": answer}] for answer in ("red", "blue")]
    dataset = dataset_of({"messages": turns, "audios": [clips[:2], clips[2:]]})
    for made in (dataset, dataset.cast_column("audios", datasets.List(datasets.Audio()))):
        samples = read(Source(made))
        assert said(samples) == ["red"]
        assert len(samples[0].clips()) == 2
        assert samples.reasons() == {"audio count": 1}


@needs_datasets
def test_clips_that_are_dropped(clips, tmp_path):
    gone = str(tmp_path / "gone.wav")
    dataset = dataset_of(questions([clips[0], gone, None]), audio="audio")
    samples = read(Source(dataset))
    assert said(samples) == ["red"]
    assert samples.reasons() == {"audio missing": 2}
    assert [row.source for row in samples.dropped] == ["dataset:row 2", "dataset:row 1"]
    assert read(Source(dataset_of(questions(clips), audio="audio")), max_seconds=0.11).reasons() == {"too long": 2}


@needs_datasets
def test_what_is_no_dataset(clips, tmp_path):
    import datasets

    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet must be a saved dataset or parquet files, got") as caught:
        read(tmp_path / "a.parquet")
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty must be a saved dataset or parquet files"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"must be a file, a directory or a datasets\.Dataset, got int"):
        read(Source(3))
    both = datasets.DatasetDict({name: dataset_of(questions(clips), audio="audio") for name in ("a", "b")})
    with pytest.raises(ValueError, match="split must be one of a, b, got nothing"):
        read(Source(both))
    with pytest.raises(ValueError, match="split must not be given for a dataset without splits, got 'a'"):
        read(Source(both["a"], split="a"))


@needs_datasets
@pytest.mark.parametrize("form", ["saved", "saved dict", "parquet"])
def test_faults_are_told_by_files_as_by_reading(form, clips, tmp_path, monkeypatch):
    """Before any row is loaded: which columns there are, of what feature, and which splits."""
    import datasets

    dataset = dataset_of({"speech": clips, "said": ["red", "blue", "green"]}, speech="audio")
    path, split = tmp_path / "made", None
    if form == "saved dict":
        datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(path)
        split = "b"
    elif form == "saved":
        dataset.save_to_disk(path)
    else:
        path.mkdir()
        dataset.to_parquet(path / "0.parquet")
    whole = {"columns": {"answer": "said"}, "question": "What is said?", "split": split}
    wrong = (
        {"columns": {}},
        {"question": ""},
        {"columns": {"answer": "gone", "reply": "said"}},
        {"split": "c"},
    )
    for settings in wrong:
        source = Source(path, **(whole | settings))
        with pytest.raises(ValueError, match=" must ") as caught:
            read(source)
        with monkeypatch.context() as patched:
            patched.setattr(datasets, "load_from_disk", None)
            patched.setattr(datasets.Dataset, "from_parquet", None)
            with pytest.raises(ValueError, match=" must ") as told:
                check(source, faults(source))
        assert str(told.value) == str(caught.value)
    assert faults(Source(path, **whole)) == []
    assert said(read(Source(path, **whole))) == ["red", "blue", "green"]


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ModuleNotFoundError, match="needs datasets: pip install datasets"):
        read(tmp_path / "a.parquet")
