"""`palkernels evaluate`, end to end: files of samples, a saved model, its table and its files."""

import json
import sys
from pathlib import Path

import pytest
from support.sounds import sine, write

from palkernels.bench.cli import main
from palkernels.bench.evaluate import table
from palkernels.model.evaluation.scores import Score, Scores, TaskScores

CHOICES = ["red", "blue"]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def row(clip: str, answer: str | None, task: str, question: str = "<audio>Which word?", **more: object) -> str:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return json.dumps({"messages": messages, "audios": [clip], "task": task, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, clips, and files of samples."""
    folder = tmp_path_factory.mktemp("evaluate")
    assert run("init", folder / "model") == 0
    for name, frequency in (("low", 200.0), ("high", 3000.0)):
        write(folder / f"{name}.wav", sine(frequency))
    words = [row(f"{name}.wav", word, "words", choices=CHOICES) for name in ("low", "high") for word in CHOICES]
    broken = [
        row("missing.wav", "red", "words"),
        row("low.wav", None, "words"),
        "{",
        row("low.wav", "green", "words", choices=CHOICES),
    ]
    (folder / "words.jsonl").write_text("\n".join([*words, *broken]) + "\n")
    names = [row(f"{name}.wav", name, "names", "<audio>What is this?") for name in ("low", "high", "low")]
    (folder / "names.jsonl").write_text("\n".join(names) + "\n")
    (folder / "empty.jsonl").write_text("")
    return folder


def test_a_table_and_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    data = ["--data", folder / "words.jsonl", "--data", folder / "names.jsonl"]
    files = ["--json", tmp_path / "a" / "figures.json", "--answers", tmp_path / "answers.jsonl"]
    settings = ["--max-new-tokens", 3, "--batch", 2, "--device", "cpu"]
    assert run("evaluate", "--model", folder / "model", *data, *files, *settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "The weights of this model are random: its answer means nothing."
    shown = {line.split()[0]: line.split() for line in lines if line.split()[:1] in (["words"], ["names"], ["all"])}
    assert {name: cells[1] for name, cells in shown.items()} == {"words": "4", "names": "3", "all": "7"}
    assert any(line.startswith("7 of 7 answers did not end within 3 tokens.") for line in lines)
    dropped = next(i for i, line in enumerate(lines) if "samples are in no figure" in line)
    assert lines[dropped].startswith("4 samples are in no figure: ")
    for reason in ("1 audio missing", "1 no answer", "1 not a JSON object", "1 answer not among the choices"):
        assert reason in lines[dropped]
    assert {line.split()[0] for line in lines[dropped + 1 :]} == {f"words.jsonl:{i}:" for i in (5, 6, 7, 8)}

    document = json.loads((tmp_path / "a" / "figures.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 7
    first = answers[0]
    assert (first["source"], first["task"]) == ("words.jsonl:1", "words")
    assert (first["question"], first["reference"], first["correct"]) == ("<audio>Which word?", "red", False)
    assert list(first["likelihoods"]) == CHOICES
    assert first["chosen"] == max(CHOICES, key=first["likelihoods"].__getitem__)
    right = sum(answer["chosen"] == answer["reference"] for answer in answers[:4])
    figures = document["tasks"]["words"]
    assert figures["samples"] == 4
    assert figures["metrics"]["choice"]["value"] == right / 4
    low, high = figures["metrics"]["choice"]["interval_95"]
    assert f"{100 * right / 4:.1f} {100 * low:.1f} to {100 * high:.1f}" in " ".join(shown["words"])
    assert document["overall"]["metrics"]["exact"]["samples"] == 7
    assert {each["source"] for each in document["dropped"]} == {f"words.jsonl:{i}" for i in (5, 6, 7, 8)}
    assert document["settings"]["data"] == [str(folder / "words.jsonl"), str(folder / "names.jsonl")]
    assert document["settings"]["model"] == str(folder / "model")
    assert (document["settings"]["batch_size"], document["settings"]["max_new_tokens"]) == (2, 3)
    assert document["versions"]["palkernels"]


def test_limit_and_metrics(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    asked = ["--data", folder / "words.jsonl", "--data", folder / "names.jsonl", "--max-new-tokens", 1]
    options = ["--limit", 2, "--metric", "exact", "--metric", "words=choice,exact", "--json", tmp_path / "figures.json"]
    assert run("evaluate", "--model", folder / "model", *asked, *options, "--answers", tmp_path / "answers.jsonl") == 0
    document = json.loads((tmp_path / "figures.json").read_text())
    assert document["settings"]["metrics"] == {"words": ["choice", "exact"], "names": ["exact"]}
    assert document["settings"]["limit"] == 2
    sources = [json.loads(line)["source"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sources == ["words.jsonl:1", "words.jsonl:3", "names.jsonl:1", "names.jsonl:2"]


def test_data_that_says_what_is_what(folder: Path, tmp_path: Path) -> None:
    """A row of another form, whose clips lie elsewhere, and a task that it does not name itself."""
    (tmp_path / "qa.json").write_text(json.dumps([{"instruction": "What?", "audio_id": "low.wav", "output": "low"}]))
    data = f"{{path: {tmp_path}/qa.json, format: openaqa, folder: {folder}, task: pitch}}"
    asked = ["--model", folder / "model", "--max-new-tokens", 1, "--answers", tmp_path / "answers.jsonl"]
    assert run("evaluate", *asked, "--data", data) == 0
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert (answer["source"], answer["task"]) == ("qa.json:item 1", "pitch")


def test_every_mistake_is_one_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    one = ["--model", folder / "model", "--data", folder / "names.jsonl"]
    for arguments, message in (
        (["--model", tmp_path, "--data", folder / "names.jsonl"], "--model must be a directory with a saved model"),
        (["--model", folder / "model", "--data", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--model", folder / "model", "--data", folder / "empty.jsonl"], "--data must be a file of samples, got"),
        (
            ["--model", folder / "model", "--data", f"{{path: {folder}, split: a}}"],
            "--data must be files of samples, got",
        ),
        ([*one, "--data", f"{{path: {folder}/names.jsonl, split: a}}"], "split must be given for a dataset alone"),
        (
            [*one, "--data", "{path: a, question: b?}"],
            "must be YAML, in which texts with ?, : or commas are quoted, got",
        ),
        ([*one, "--data", f"{{path: {folder}/names.jsonl, tasks: a}}"], "tasks is not known: did you mean 'task'?"),
        ([*one, "--metric", "rouge"], "metrics must be some of choice, exact, wer, cer, bleu, chrf, got ['rouge']"),
        ([*one, "--metric", "other=wer"], "metrics must be given for a task of the samples, 'names', got 'other'"),
        ([*one, "--metric", "names=choice"], "the metric choice must be of samples with choices, got names.jsonl:1"),
        ([*one, "--batch", 0], "--batch"),
        ([*one, "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:INDEX"),
        ([*one, "--json", tmp_path / "taken"], "--json's folder must be free for taken, got a folder of that name"),
        ([*one, "--json", tmp_path / "a", "--answers", tmp_path / "a"], "--answers must be another file than --json"),
    ):
        assert run("evaluate", *arguments) == 2
        said = capfd.readouterr().err.strip().splitlines()
        assert said[-1].startswith("error: "), arguments
        assert message in said[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_missing_package_is_named(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    asked = ["--model", folder / "model", "--data", folder / "names.jsonl"]
    assert run("evaluate", *asked, "--metric", "names=wer") == 2
    assert "the metric wer needs jiwer: pip install 'palkernels[evaluate]'" in capfd.readouterr().err


def test_files_are_written_when_all_is_done(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run leaves an earlier run's files as they were."""
    (tmp_path / "answers.jsonl").write_text("earlier\n")

    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("palkernels.bench.evaluate.evaluate", interrupted)
    asked = ["--model", folder / "model", "--data", folder / "names.jsonl"]
    assert (
        run("evaluate", *asked, "--answers", tmp_path / "answers.jsonl", "--json", tmp_path / "new" / "a.json") == 130
    )
    assert (tmp_path / "answers.jsonl").read_text() == "earlier\n"
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_table_of_what_is_there() -> None:
    """A metric's own number of samples where it is not the task's; a blank where a task has no such figure."""
    scores = Scores(
        tasks=(
            TaskScores("mixed", 4, (Score("choice", 3, 2 / 3, 0.2, 0.9), Score("exact", 4, 0.5, 0.15, 0.85))),
            TaskScores("", 1, (Score("wer", 1, 1.25, None, None),)),
            TaskScores("captions", 1200, (Score("bleu", 1200, 23.456, 20.0, 26.0, "v"),)),
        ),
        overall=TaskScores(None, 1205, (Score("wer", 1, 1.25, None, None),)),
        answers=(),
        dropped=(),
        settings={},
        versions={},
    )
    shown = table(scores)
    assert shown.groups == [("", 2), ("choice", 3), ("exact match", 2), ("word errors", 2), ("BLEU", 2)]
    assert [column.heading for column in shown.columns[2:7]] == ["%", "95 % interval", "samples", "%", "95 % interval"]
    assert shown.columns[-2].heading == "of 100"
    assert shown.rows[0] == ["mixed", "4", "66.7", "20.0 to 90.0", "3", "50.0", "15.0 to 85.0", "", "", "", ""]
    assert shown.rows[1] == ["(none)", "1", "", "", "", "", "", "125.0", "", "", ""]
    assert shown.rows[2] == ["captions", "1,200", "", "", "", "", "", "", "", "23.5", "20.0 to 26.0"]
    assert shown.rows[3][:2] == ["all", "1,205"]
