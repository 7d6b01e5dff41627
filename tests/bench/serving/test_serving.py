"""`palkernels bench-serving`: what it asks of servers, here ones that stand in for vLLM's, and its figures."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import stand_in_vllm
from support.commands import running
from support.figure1 import run
from support.servers import free_port

pytest.importorskip("openai", reason="needs palkernels[client]")
SIZES = ["--questions", "1,4", "--concurrency", "1,3", "--requests", 4, "--seconds", 0.2, "--new-tokens", 5]


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stand_in_vllm.install(tmp_path / "packages")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    """Two directories of what passes for audio LLMs."""
    directories = [tmp_path / "first", tmp_path / "second"]
    for directory in directories:
        directory.mkdir()
        (directory / "config.json").write_text('{"model_type": "pal"}')
    return directories


def words(saved: list[Path], out: Path, *server: object) -> list[object]:
    models = [word for directory in saved for word in ("--model", directory)]
    return ["bench-serving", *models, *SIZES, "--out", out, "--", *server]


def is_there(directory: Path) -> bool:
    try:
        os.kill(int((directory / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_every_load_of_every_model(saved: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row each, of figures that are the answers'; the servers are stopped."""
    assert run(*words(saved, tmp_path / "out", "--max-model-len", 77)) == 0
    document = json.loads((tmp_path / "out" / "serving.json").read_text())
    loads = [(row["model"], row["concurrency"], row["questions_per_clip"]) for row in document["rows"]]
    assert loads == [(name, c, q) for name in ("first", "second") for c in (1, 3) for q in (1, 4)]
    for row in document["rows"]:
        assert (row["requests"], row["prompt_tokens"], row["cached_share_of_prompts"]) == (4, 100, 0.25)
        assert row["tokens_per_second"] == pytest.approx(5 * row["requests_per_second"])
        assert 0 < row["first_token_seconds"]["p50"] <= row["first_token_seconds"]["p95"] < row["seconds"]
        assert 0 <= row["inter_token_seconds"]["p50"] <= row["inter_token_seconds"]["p95"]
    assert "Results: " in capsys.readouterr().out
    page = (tmp_path / "out" / "serving.md").read_text()
    assert "requests/s vs first" in page
    assert "| 3 | 4 | second |" in page
    assert "4 requests a row, each a clip of 0.2 s and a question, 100 tokens together, answered with 5" in page
    assert f"--model {saved[0]} --model {saved[1]} --questions 1,4" in page
    assert "-- --max-model-len 77`" in page
    for directory in saved:
        assert not is_there(directory)
        arguments = json.loads((directory / "arguments").read_text())
        assert arguments[-2:] == ["--max-model-len", "77"]
        assert arguments[arguments.index("--dtype") + 1] in ("float32", "bfloat16")


def test_questions_about_a_clip_follow_each_other(saved: list[Path], tmp_path: Path) -> None:
    """The clip comes first, and questions differ from their beginning: they share the clip and nothing else. Both
    models hear the same clips, and no load hears those of another."""
    assert run(*words(saved, tmp_path / "out")) == 0
    asked = [json.loads((directory / "asked").read_text()) for directory in saved]
    parts: list[Any] = [[request["messages"][0]["content"] for request in of_model] for of_model in asked]
    heard = [[sound["input_audio"]["data"] for sound, _ in of_model] for of_model in parts]
    assert sorted(heard[0]) == sorted(heard[1])
    clips = heard[0][-16:]  # behind what warms up: loads of four requests about four clips, one, four and one
    assert [len(set(clips[at : at + 4])) for at in (0, 4, 8, 12)] == [4, 1, 4, 1]
    assert len(set(clips)) == 10
    said = sorted(question["text"] for _, question in parts[0][-12:-8])  # those in flight may overtake each other
    assert [text[:2] for text in said] == ["0 ", "1 ", "2 ", "3 "]
    assert {len(text) for text in said} == {64}


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("not-start", "the server must start, got exit code 1: ValueError: weights must be there, got none"),
        ("refuse", "the server refused: Error code: 400"),
        ("die", "the server of first must live on, got exit code 9: MemoryError: no more"),
        ("stop-early", "the server must answer with 5 tokens, got 4"),
    ],
)
def test_a_server_that_fails(
    saved: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], behaviour: str, message: str
) -> None:
    assert run(*words(saved, tmp_path / "out", "--behave", behaviour)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not is_there(saved[0])
    assert not (saved[1] / "pid").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--requests", 6], "--requests must be a multiple of every number of --questions, got 4"),
        (["--requests", 2], "--requests must be at least the most questions of a clip and requests in flight, 4"),
        (["--questions", "0,1"], "--questions must be distinct counts of at least 1"),
        (["--new-tokens", 1], "--new-tokens must be at least 2, got 1"),
        (["--seconds", 601], "--seconds must be from 0.1 to 600"),
        (["--model", "llama-3.2-1b"], "--model must be one preset or directories"),
        (["--model", "nowhere"], "or a saved audio LLM, got 'nowhere'"),
        (["--dtype", "int8"], "--dtype must be one of auto"),
        (["--", "--port=80"], "options of the server must not have --port, which the command sets, got '--port=80'"),
    ],
)
def test_refused(
    saved: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[object], message: str
) -> None:
    arguments = words(saved, tmp_path / "out")
    assert run(*arguments[:-1], *given) == 2
    assert message in capsys.readouterr().err
    assert not (saved[0] / "pid").exists()


def test_another_model_is_refused(saved: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved[0] / "config.json").write_text('{"model_type": "llama"}')
    assert run(*words(saved, tmp_path / "out")) == 2
    assert "--model must be a saved audio LLM, got one of type llama" in capsys.readouterr().err


@pytest.fixture
def started(saved: list[Path]) -> Iterator[str]:
    """The URL of a server that runs."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(saved[0])]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--behave", "ask-for-key"]
    with subprocess.Popen(command) as process:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            time.sleep(0.1)
        yield url
        process.kill()


@pytest.mark.parametrize("ending", ["", "/v1", "/"])
def test_a_server_that_runs(
    started: str, saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """It is asked by the name of its model, with the key that it wants, and goes on. What it runs on is not known."""
    monkeypatch.setenv("OPENAI_API_KEY", "the key")
    arguments = ["bench-serving", "--serve", started + ending, *SIZES, "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    document = json.loads((tmp_path / "out" / "serving.json").read_text())
    loads = [(row["model"], row["concurrency"], row["questions_per_clip"]) for row in document["rows"]]
    assert loads == [("the model", c, q) for c in (1, 3) for q in (1, 4)]
    assert all(row["cached_share_of_prompts"] == 0.25 for row in document["rows"])
    assert all(row["processor_seconds_per_request"] is None for row in document["rows"])
    assert document["meta"]["versions"]["vllm"] == "0.32.9"
    page = (tmp_path / "out" / "serving.md").read_text()
    assert page.startswith(f"the model, vLLM 0.32.9, at {started}{ending}, ")
    assert "processor s" not in page
    assert f"`palkernels bench-serving --serve {started}{ending} --questions 1,4" in page
    assert "--dtype" not in page
    asked = json.loads((saved[0] / "asked").read_text())
    assert {request["model"] for request in asked} == {"the model"}
    assert is_there(saved[0])
    assert run(*arguments[:3], *SIZES, "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "serving.json").read_text())
    seeds = [one["meta"]["options"]["seed"] for one in (document, again)]
    assert seeds[0] != seeds[1]  # the server may know the first run's clips
    assert f"--seed {seeds[0]}" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "somewhere"], "--serve must come without --model and options of a server"),
        (["--", "--max-model-len", 77], "--serve must come without --model and options of a server"),
        (["--serve", "localhost:8000"], "--serve must begin with http:// or https://, got 'localhost:8000'"),
        ([], "--serve must be a server of vLLM's, with its figures under /metrics, got http://127.0.0.1:1: URLError"),
    ],
)
def test_a_server_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[object], message: str
) -> None:
    assert run("bench-serving", "--serve", "http://127.0.0.1:1", *SIZES, "--out", tmp_path / "out", *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted(saved: list[Path], tmp_path: Path) -> None:
    """Ctrl-C stops the server and leaves nothing behind."""
    arguments = [str(word) for word in words(saved, tmp_path / "out")]
    arguments[arguments.index("--requests") + 1] = "100000"
    with running(arguments, tmp_path) as command:
        while not (saved[0] / "asked").exists() and command.is_alive():
            time.sleep(0.05)
        command.send(signal.SIGINT)
        code, _, errors = command.end()
    assert (code, errors) == (130, "error: interrupted\n")
    assert not is_there(saved[0])
    assert not (tmp_path / "out").exists()
