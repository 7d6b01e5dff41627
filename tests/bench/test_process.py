"""Ctrl-C at any time, started in the background or not, and output on any terminal."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import running
from support.figure1 import small, tiny_config
from support.limits import child
from support.thorough import EVERYTHING

from palkernels.bench.cli import main

# With the signal blocked until the command takes it, so that none comes while Python itself starts.
START = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("started", flush=True)
from palkernels.bench.cli import main
main()
"""
PLAIN = "from palkernels.bench.cli import main; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "model"
    with pytest.raises(SystemExit) as ended:
        main(["init", str(directory)])
    assert ended.value.code == 0
    return directory


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "out"


@pytest.fixture(scope="module")
def commands(model: Path, out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config().save_pretrained(folder)
    return {
        "help": ["--help"],
        "doctor": ["doctor"],
        "ask": ["ask", "--model", str(model), "What is it?", "--max-new-tokens", "200"],
        "figure1": [*map(str, small(folder, out)), "--repeats", "100000"],
    }


@pytest.mark.parametrize(
    ("name", "delay"),
    [
        *((name, delay) for name in ("help", "doctor", "ask", "figure1") for delay in (0.0, 0.05, 0.3)),
        *(("help", 0.1), ("doctor", 1.0), ("ask", 2.0), ("figure1", 4.0)),
    ],
)
def test_interrupted_at_any_time(commands: dict[str, list[str]], out: Path, name: str, delay: float) -> None:
    with child([sys.executable, "-c", START, *commands[name]]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate(timeout=120)
    if process.returncode == 0:  # it was done before
        assert name != "figure1"
        assert delay > 0
        assert error == ""
        assert printed
    else:
        assert (process.returncode, error) == (130, "error: interrupted\n")
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_started_in_the_background(commands: dict[str, list[str]], out: Path) -> None:
    """A shell without job control starts what runs in the background with Ctrl-C ignored. Nothing is left behind."""
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    with child([*shell, sys.executable, "-c", PLAIN, *commands["figure1"]]) as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("Estimated"):
            assert line, process.communicate()
        time.sleep(1)  # in the midst of the first point
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "error: interrupted\n")
    assert list(out.parent.iterdir()) == []


def test_terminated(commands: dict[str, list[str]], out: Path, tmp_path: Path) -> None:
    """Nothing is left behind, either, where a batch system ends it."""
    with running(commands["figure1"], tmp_path) as command:
        while not (line := command.stdout.readline()).startswith("Estimated"):
            assert line, command.end()
        time.sleep(1)  # in the midst of the first point
        command.send(signal.SIGTERM)
        ended, _, error = command.end()
    assert (ended, error) == (143, "error: terminated\n")
    assert list(out.parent.iterdir()) == []


# What an interruption may become on its way, or whether it gets lost.
LOST = """
import os, signal, sys, time
from palkernels.bench import cli, process
process.clean_up_when_ended()

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

def work(way):
    if way == "destructor":
        Dropped()
        time.sleep(60)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        if way == "other":
            raise RuntimeError("initialization failed")
        if way == "exit":
            sys.exit(3)
    finally:
        print("cleaned up")
    return 0, None

cli._run = lambda words: work(*words)
cli.main()
"""


@pytest.mark.parametrize("way", ["destructor", "other", "exit", "swallowed"])
def test_an_interruption_that_becomes_something_else(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOST, way], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
    assert done.stdout == ("" if way == "destructor" else "cleaned up\n")


def test_a_call_from_another_program_takes_no_signals() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("encoding", [pytest.param("ascii", marks=pytest.mark.slow), "latin-1"])
def test_any_terminal(
    commands: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Every command writes what the encoding has, and replaces the rest.

    The two that measure and simulate, and what compares them, do it for the smaller encoding; all for both with
    PALKERNELS_TESTS=all.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    model, named = commands["ask"][2], str(tmp_path / "Modell-日本")
    simulate = [
        "simulate",
        "--methods",
        "plits,lal",
        "--layers",
        "1",
        "--no-lengths",
        "--no-serving",
        "--out",
        str(two),
    ]
    shown = {}
    calls = [
        (["--help"], 0),
        (["figure1", "--help"], 0),
        (["doctor"], 0),
        (["init", named], 0),
        (["ask", "--model", model, "Wäs ist 日本?", "--max-new-tokens", "20"], 0),
        (["ask", "--model", f"{named}?", "Was?"], 2),
        (["microbench", "--op", "forward", "--shape", "1,2,1,4,8,16", "--seconds", "0.01", "--device", "cpu"], 0),
    ]
    everything = EVERYTHING or encoding == "ascii"
    if everything:
        calls += [
            ([*commands["figure1"][:-4], "--repeats", "1", "--out", str(one)], 0),
            ([*simulate, "--audio-tokens", "16,32"], 0),
            (["compare", str(one / "figure1.json"), str(two / "simulate.json")], 0),
        ]
    for arguments, code in calls:
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, "strict") for name in ("stdout", "stderr")}
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        monkeypatch.undo()
        for stream in streams.values():
            stream.flush()
        out, error = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())
        assert ended.value.code == code, (arguments, error)
        shown[arguments[0]] = out + error
    assert "Modell-??" in shown["ask"]
    if everything:
        assert "Only in B" in shown["compare"]


def test_an_answer_on_a_terminal_for_ascii(commands: dict[str, list[str]], tmp_path: Path) -> None:
    with running(commands["ask"], tmp_path, encoding="ascii") as command:
        ended, printed, error = command.end()
    assert ended == 0, error
    assert printed.isascii()
    assert "?" in printed
