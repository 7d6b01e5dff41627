"""`palkernels figure1` interrupted, and resumed."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.figure1 import FILES, run, small
from support.limits import child


def command_of(arguments: list[str]) -> list[str]:
    return [sys.executable, "-c", f"from palkernels.bench.cli import main; main({arguments!r})"]


def test_an_interruption_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """Nor does SIGTERM: see test_started_in_the_background in test_process.py."""
    out = tmp_path / "out"
    arguments = [*map(str, small(tiny, out)), "--repeats", "100000"]
    with child(command_of(arguments)) as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("Estimated"):
            assert line, process.communicate()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_valid_and_goes_on(number: signal.Signals, code: int, tiny: Path, tmp_path: Path) -> None:
    """What was measured before the signal is written, and `--resume` measures the rest alone."""
    out = tmp_path / "out"
    arguments = [*map(str, small(tiny, out)), "--audio-tokens", "16,32,64,128", "--repeats", "1"]
    with child(command_of(arguments)) as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("train, 32 audio tokens"):
            assert line, process.communicate()
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == code
    assert sorted(path.name for path in out.iterdir()) == FILES
    first = json.loads((out / "figure1.json").read_text())
    assert first["meta"]["complete"] is False
    assert 4 <= len(first["rows"]) < 16

    assert run(*arguments, "--resume") == 0
    second = json.loads((out / "figure1.json").read_text())
    assert second["meta"]["complete"] is True
    assert second["meta"]["date"] == first["meta"]["date"]
    assert len(second["rows"]) == 16
    assert second["rows"][: len(first["rows"])] == first["rows"]


def test_resume_needs_the_same_conditions(
    measured: tuple[dict[str, Any], Path, str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = measured
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    assert run(*small(tiny, copy), "--resume", "--seed", 1) == 2
    assert "--resume must be given what the run in --out was given, got seed 0 and now 1" in capsys.readouterr().err
    before = json.loads((copy / "figure1.json").read_text())
    assert run(*small(tiny, copy), "--resume") == 0  # nothing is left to do
    assert json.loads((copy / "figure1.json").read_text()) == before


def test_resume_sees_another_model_and_measures_points_that_lack_a_method(
    measured: tuple[dict[str, Any], Path, str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory may hold another model than it did; a file may have been cut."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    shutil.copytree(measured[1], out)
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
