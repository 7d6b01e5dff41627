"""Run `palkernels` in a process of its own that need not import everything first."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import palkernels.bench.experiments.figure1
import palkernels.bench.report.html  # noqa: F401  what every command imports when it runs
from palkernels.bench import cli, init, machine, process
from support.processes import FORKED


def nothing() -> None:
    pass


def without_pictures() -> None:
    """Draw neither plot nor report, which take longer than small models do."""
    from palkernels.bench.report import files

    files.render = lambda document: b""
    files.report_page = lambda document: ""


def with_little_memory() -> None:
    """Let the machine seem to have little memory left, and draw no pictures."""
    machine.available_bytes = lambda: machine._MARGIN + 450 * 2**20
    without_pictures()


def with_runs_that_wait() -> None:
    """Let a study's runs write the number of their process, and wait."""
    from palkernels.bench.study import runs, study

    study.llm_file = study.encoder_folder = lambda: Path("nothing-reads-it")
    study.make = lambda *_: None
    runs.TRAIN = (
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[2]).with_name('pid').write_text(f'{os.getpid()} ')\n"
        "time.sleep(600)\n"
    )


def terminated_amid_writing() -> None:
    """Let SIGTERM come when `init` has written a part of a model."""

    def slow(directory: Path, *arguments: Any) -> None:
        assert (directory / "model.safetensors").is_file()
        os.kill(os.getpid(), signal.SIGTERM)

    init.write_untrained = slow


def _run(
    words: list[str],
    environment: dict[str, str],
    written: Connection,
    errors: Path,
    prepare: Callable[[], None],
    encoding: str,
) -> None:
    os.environ.clear()  # what the fork server found when the first test asked for it
    os.environ.update(environment)
    process.take_signals()  # as where a program does nothing but run the command
    os.dup2(written.fileno(), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    prepare()
    cli.main(words)


class Running:
    """A command that runs: what it has printed, and, once it has ended, its exit code and its errors."""

    def __init__(self, words: list[str], errors: Path, prepare: Callable[[], None], encoding: str) -> None:
        self.errors = errors
        reader, written = FORKED.Pipe(duplex=False)
        self.process = FORKED.Process(target=_run, args=(words, dict(os.environ), written, errors, prepare, encoding))
        self.process.start()
        written.close()
        self.stdout: IO[str] = open(os.dup(reader.fileno()), encoding=encoding)  # noqa: SIM115
        reader.close()

    def send(self, number: signal.Signals) -> None:
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, number)

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float) -> None:
        self.process.join(seconds)

    def end(self) -> tuple[int | None, str, str]:
        """Wait for the end; return the exit code, what it printed since, and the errors."""
        printed = self.stdout.read()
        self.process.join()
        return self.process.exitcode, printed, self.errors.read_text()


@contextlib.contextmanager
def running(
    words: list[str], folder: Path, prepare: Callable[[], None] = nothing, encoding: str = "utf-8"
) -> Iterator[Running]:
    """Run a command, after a call of ``prepare`` in its process; killed at the end if it is still there."""
    command = Running(words, folder / "errors.txt", prepare, encoding)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.join()
        command.stdout.close()
