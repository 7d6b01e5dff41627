"""A server of vLLM's in a process of its own, and what it tells of itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from palkernels.bench.errors import UserError

__all__ = ["Server", "check_installed", "serve"]

NAME = "model"  # what requests call the model
SECONDS_TO_STOP, SECONDS_TO_END = 60, 3
LAST_LINES, LONGEST = 12, 2_000  # of the log and characters, in an error
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


def check_installed() -> None:
    """Raise where this environment has no vLLM, or no client of OpenAI's.

    Raises:
        UserError: one is missing.
    """
    for package, extra in (("vllm", "vllm"), ("openai", "client")):
        if find_spec(package) is None:
            raise UserError(f"bench-serving needs the package {package}: pip install 'palkernels[{extra},bench]'")


class Server:
    """A server that runs.

    Attributes:
        url: Where it speaks OpenAI's protocol.
        process: It.
    """

    def __init__(self, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.address, self.process, self.url, self.log = address, process, f"{address}/v1", log

    def is_ready(self) -> bool:
        """Return whether it takes requests."""
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def cached_tokens(self) -> tuple[float, float]:
        """Return the tokens of prompts whose keys and values were found by prefix caching, and those looked for."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        hits, queries = (
            sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")) for name in (HITS, QUERIES)
        )
        return hits, queries

    def processor_seconds(self) -> float:
        """Return the seconds of all cores that its processes have taken, as /proc counts them."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # ended meanwhile
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:  # its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def ends(self) -> bool:
        """Return whether it has ended, or does so within a moment: connections are closed before."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        return self.process.returncode is not None

    def last_words(self) -> str:
        """Return how it ended, if it has, and what it printed last, of errors alone if there are any."""
        code = self.process.poll()
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line or " must " in line]
        said = " ".join((errors or lines)[-LAST_LINES:])[-LONGEST:] or "nothing was printed"
        return f"{'no end' if code is None else f'exit code {code}'}: {said}"


@contextmanager
def serve(directory: Path, dtype: str, options: Sequence[str], log: Path, start_seconds: float) -> Iterator[Server]:
    """Start a server for a saved model and stop it, with all of its processes, at the end, whatever that is.

    Raises:
        UserError: It ends before it is ready, or takes longer than `start_seconds`.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # What `vllm serve` runs. That command asks for a package of the name vllm, which the build for CPUs has not.
    command = [
        sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, *options,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            deadline = time.monotonic() + start_seconds
            while not server.is_ready():
                if process.poll() is not None:
                    raise UserError(f"the server must start, got {server.last_words()}")
                if time.monotonic() > deadline:
                    raise UserError(f"the server must start within {start_seconds:g} s, got {server.last_words()}")
                time.sleep(0.5)
            yield server
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
    finally:
        with suppress(ProcessLookupError):  # what it started, if it has left any
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
