"""`palkernels figure1` interrupted, and resumed."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.commands import running, without_pictures
from support.figure1 import FILES, run, small


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done."""
    out = tmp_path_factory.mktemp("finished") / "results"
    assert run(*small(tiny, out)) == 0
    return out


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_run_is_valid_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    """What was measured before the signal is written, and `--resume` measures the rest alone, interrupted or not.

    Before the first point nothing is left behind: see test_started_in_the_background in test_process.py.
    """
    out = tmp_path / "out"
    arguments = [*map(str, small(tiny, out)), "--audio-tokens", "16,32,64,128", "--repeats", "1"]

    def interrupted(number: signal.Signals, code: int, point: str, *more: str) -> dict[str, Any]:
        with running([*arguments, *more], tmp_path, without_pictures) as command:
            while not (line := command.stdout.readline()).startswith(point):
                assert line, command.end()
            command.send(number)
            ended, _, error = command.end()
        assert ended == code, error
        assert sorted(path.name for path in out.iterdir()) == FILES
        document: dict[str, Any] = json.loads((out / "figure1.json").read_text())
        assert document["meta"]["complete"] is False
        return document

    first = interrupted(signal.SIGINT, 130, "train, 32 audio tokens")
    assert 4 <= len(first["rows"]) < 16
    second = interrupted(signal.SIGTERM, 143, "train, 128 audio tokens", "--resume")
    assert 8 <= len(second["rows"]) < 16
    assert run(*arguments, "--resume") == 0
    last = json.loads((out / "figure1.json").read_text())
    assert last["meta"]["complete"] is True
    assert last["meta"]["date"] == second["meta"]["date"] == first["meta"]["date"]
    assert len(last["rows"]) == 16
    for rows in (first["rows"], second["rows"]):
        assert last["rows"][: len(rows)] == rows


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_resume_needs_the_same_conditions(
    finished: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert run(*small(tiny, copy), "--resume", "--seed", 1) == 2
    assert "--resume must be given what the run in --out was given, got seed 0 and now 1" in capsys.readouterr().err
    before = json.loads((copy / "figure1.json").read_text())
    assert run(*small(tiny, copy), "--resume") == 0  # nothing is left to do
    assert json.loads((copy / "figure1.json").read_text()) == before


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_resume_sees_another_model_and_measures_points_that_lack_a_method(
    finished: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory may hold another model than it did; a file may have been cut."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    shutil.copytree(finished, out)
    arguments = small(model, out)
    document = json.loads((out / "figure1.json").read_text().replace(str(tiny), str(model)))  # as if measured on it
    cut = {"meta": document["meta"], "rows": document["rows"][1:]}
    (out / "figure1.json").write_text(json.dumps(cut))
    assert run(*arguments, "--resume") == 0
    rows = json.loads((out / "figure1.json").read_text())["rows"]
    assert sorted((row["mode"], row["method"], row["audio_tokens"]) for row in rows) == sorted(
        (mode, method, count) for mode in ("train", "infer") for method in ("plits", "lal") for count in (16, 256)
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    assert run(*arguments, "--resume") == 2
    assert "got digests {'model config': " in capsys.readouterr().err
    (out / "figure1.json").write_text(json.dumps({"meta": {}, "rows": []}))
    assert run(*arguments, "--resume") == 2
    assert "--resume must find a run of this version of figure1" in capsys.readouterr().err
