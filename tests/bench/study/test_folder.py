"""A folder of generated sound: the same bytes from the same settings, whatever ended the run before."""

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import soundfile
from rich.console import Console
from support.generated import contents, lines

from palkernels.bench.errors import UserError
from palkernels.bench.study.sounds import folder as sounds
from palkernels.bench.study.sounds.folder import MANIFEST, Settings, make
from palkernels.bench.study.sounds.picture import main as draw
from palkernels.bench.study.sounds.picture import sheet

SETTINGS = Settings(train=30, test=10, tasks=("direction", "loudness"), seed=3)
RUN = """
import sys
from pathlib import Path
from palkernels.bench.study.sounds.folder import Settings, make
make(Path(sys.argv[1]), Settings(train=30, test=10, tasks=("direction", "loudness"), seed=3))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds") / "made"
    make(folder, SETTINGS)
    return folder


def refusal(folder, settings=SETTINGS):
    before = contents(folder) if folder.is_dir() else None
    with pytest.raises(UserError) as caught:
        make(folder, settings)
    assert before is None or contents(folder) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_questions_and_clips_have_the_form_that_training_reads(made):
    manifest = make(made, SETTINGS)
    assert manifest.settings == SETTINGS
    assert manifest.path("loudness", "test") == made / "loudness" / "test.jsonl"
    heard = []
    for task, clips in (("direction", 1), ("loudness", 2)):
        for split, count in (("train", 30), ("test", 10)):
            rows = lines(manifest.path(task, split))
            assert len(rows) == count
            for row in rows:
                assert list(row) == ["messages", "audios", "task", "choices"]
                user, assistant = row["messages"]
                assert (user["role"], assistant["role"], row["task"]) == ("user", "assistant", task)
                assert user["content"].count("<audio>") == len(row["audios"]) == clips
                assert assistant["content"] in row["choices"]
                heard += [made / task / name for name in row["audios"]]
    assert len(heard) == len(set(heard)) == manifest.clips == 120
    seconds = 0.0
    for path in heard:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype, info.format) == (16_000, 1, "PCM_16", "WAV")
        assert 0.5 <= info.duration <= 4
        seconds += info.duration
    assert manifest.seconds == pytest.approx(seconds, abs=0.01)


def test_the_lines_of_the_clips_say_what_they_are_made_of(made):
    clips = lines(made / "direction" / "clips.jsonl")
    assert [clip["split"] for clip in clips] == ["train"] * 30 + ["test"] * 10
    assert {clip["new_combination"] for clip in clips[:30]} == {False}
    assert [clip["new_combination"] for clip in clips[30:]] == [False, True] * 5
    assert all((clip["semitones"] > 0) == (clip["answer"] == "rising") for clip in clips)


def test_the_same_settings_give_the_same_bytes_and_more_of_them_begin_with_the_same(made, tmp_path):
    make(tmp_path / "again", SETTINGS)
    assert contents(tmp_path / "again") == contents(made)
    more = Settings(train=60, test=10, tasks=("direction",), seed=3)
    make(tmp_path / "more", more)
    assert lines(tmp_path / "more" / "direction" / "train.jsonl")[:30] == lines(made / "direction" / "train.jsonl")
    clips = {name: content for name, content in contents(made / "direction").items() if name.endswith(".wav")}
    assert clips.items() <= contents(tmp_path / "more" / "direction").items()
    make(tmp_path / "other", Settings(train=30, test=10, tasks=("direction",), seed=4))
    assert not set(clips.values()) & set(contents(tmp_path / "other" / "direction").values())


@pytest.mark.parametrize("files", [1, *(pytest.param(files, marks=pytest.mark.slow) for files in (20, 70)), 110])
def test_a_killed_run_goes_on_to_the_same_bytes(made, tmp_path, files):
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", RUN, str(folder)])
    while process.poll() is None and sum(1 for _ in folder.rglob("*.wav")) < files:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name, content in contents(folder).items():  # what has its name is whole
        if name.endswith(".wav") and not name.rpartition("/")[2].startswith("."):
            assert content == (made / name).read_bytes()
    make(folder, SETTINGS)
    assert contents(folder) == contents(made)


def test_whole_batches_are_not_made_again(made, tmp_path, monkeypatch):
    original, places = sounds.question, []

    def stop(task, split, place, seed, speech):
        if len(places) == 60:
            raise KeyboardInterrupt
        places.append((task.name, split, place))
        return original(task, split, place, seed, speech)

    monkeypatch.setattr(sounds, "question", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, SETTINGS)
    assert not (tmp_path / MANIFEST).exists()
    first = list(places)
    monkeypatch.setattr(
        sounds, "question", lambda *given: places.append((given[0].name, *given[1:3])) or original(*given)
    )
    make(tmp_path, SETTINGS)
    again = places[len(first) :]
    assert len(again) + len(first) == 80 + len(set(first) & set(again))
    assert len(set(first) & set(again)) < sounds.BATCH
    assert contents(tmp_path) == contents(made)


def test_a_finished_folder_is_left_as_it_is(made, monkeypatch):
    monkeypatch.setattr(sounds, "question", None)
    monkeypatch.setattr(sounds, "_write", None)
    assert make(made, SETTINGS).clips == 120


def test_progress_is_shown(tmp_path):
    text = io.StringIO()
    make(tmp_path, Settings(train=1, test=1, tasks=("direction",)), Console(file=text, force_terminal=True))
    assert "direction" in text.getvalue()
    assert "2/2" in text.getvalue()


def test_a_folder_of_other_settings_or_files_is_refused(made, tmp_path, monkeypatch):
    other = Settings(train=31, test=10, tasks=SETTINGS.tasks, seed=3)
    assert refusal(made, other) == f"{str(made)!r} must be new or made with train 31, got a folder with 30"
    (tmp_path / "holiday.txt").write_text("sun")
    assert "must be new, empty or made by the same settings, got a folder of other files" in refusal(tmp_path)
    assert "must be a folder that can be written to" in refusal(tmp_path / "holiday.txt")

    begun = tmp_path / "begun"
    with monkeypatch.context() as patch:
        patch.setattr(sounds, "question", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(begun, SETTINGS)
    assert "must be new or begun with train 31, got a folder with 30" in refusal(begun, other)
    with monkeypatch.context() as patch:
        patch.setattr(sounds, "package_version", lambda name: "0.0")
        assert "must be new or begun with versions" in refusal(begun)
    make(begun, SETTINGS)
    assert contents(begun) == contents(made)


def test_other_versions_may_read_a_finished_folder(made, monkeypatch):
    monkeypatch.setattr(sounds, "package_version", lambda name: "0.0")
    assert "0.0" not in make(made, SETTINGS).versions.values()


@pytest.mark.parametrize("name", ["direction/test/00003.wav", "loudness/train.jsonl", "loudness/clips.jsonl"])
def test_a_damaged_folder_is_refused(made, tmp_path, name):
    folder = tmp_path / "copy"
    for path, content in contents(made).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / name).write_bytes((folder / name).read_bytes()[:-2] + b"??")
    way = f"remove {str(folder)!r} to make it again"
    assert refusal(folder) == f"{str(folder / name)!r} must be as it was made, got another content: {way}"
    (folder / name).unlink()
    assert refusal(folder) == f"{str(folder / name)!r} must be as it was made, got no file: {way}"
    (folder / MANIFEST).write_text("{}")
    assert "must be a manifest of sounds" in refusal(folder)


def test_two_processes_do_not_make_one_folder(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert "must be free, got a folder that another process is making" in refusal(tmp_path)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(tasks=()), "tasks must be distinct names out of words, "),
        (Settings(tasks=("count", "count")), "got 'count, count'"),
        (Settings(tasks=("weather",)), "got 'weather'"),
        (Settings(train=0), "train must be from 1 to 99999 questions, got 0"),
        (Settings(test=100_000), "test must be from 1 to 99999 questions, got 100000"),
        (Settings(seed=-1), "seed must be from 0 to 2**32 - 1, got -1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    assert message in refusal(tmp_path / "new", settings)
    assert not (tmp_path / "new").exists()


def test_the_picture_shows_a_made_folder(made, tmp_path, capsys):
    png = sheet(made)
    assert png.startswith(b"\x89PNG")
    assert png == sheet(made)
    assert draw([str(made), str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").read_bytes() == png
    assert draw([str(tmp_path), str(tmp_path / "other.png")]) == 2
    assert draw([]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith(f"error: {str(tmp_path)!r} must be a folder of finished sounds, got ")
    assert json.loads((made / MANIFEST).read_bytes())["form"] == sounds.FORM
