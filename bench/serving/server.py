"""A server of vLLM's in a process of its own, and what it tells of itself."""

from __future__ import annotations

import json
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
from typing import Any

from palkernels.bench.endpoint import NO_KEY, address_of, api_key
from palkernels.bench.errors import UserError, one_line

__all__ = ["Server", "StartedServer", "check_installed", "running_server", "serve"]

NAME = "model"  # what requests call the model
SECONDS_TO_STOP, SECONDS_TO_END = 60, 3
LAST_LINES, LONGEST = 12, 2_000  # of the log and characters, in an error
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


def check_installed(starts: bool) -> None:
    """Raise where this environment has no client of OpenAI's, or no vLLM where it starts servers.

    Raises:
        UserError: one is missing.
    """
    needed = {"openai": "client"} | ({"vllm": "vllm"} if starts else {})
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise UserError(f"bench-serving needs the package {package}: pip install 'palkernels[{extra},bench]'")


class Server:
    """A server of vLLM's that runs.

    Attributes:
        url: Where it speaks OpenAI's protocol.
        model: What requests call its model.
        key: What it wants to know of who asks.
    """

    def __init__(self, address: str, model: str, key: str = NO_KEY) -> None:
        self.address, self.model, self.key, self.url = address, model, key, f"{address}/v1"

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

    def processor_seconds(self) -> float | None:
        """Return the seconds of all cores that its processes have taken, None if they are not this one's to count."""
        return None

    def ended(self) -> str | None:
        """Return how it ended, or None if it has not."""
        return None if self.is_ready() else "no answer"


class StartedServer(Server):
    """A server that this process has started.

    Attributes:
        process: It.
        log: What it prints.
    """

    def __init__(self, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
        super().__init__(address, NAME)
        self.process, self.log = process, log

    def processor_seconds(self) -> float:
        """Return the seconds of all cores that its processes have taken, as /proc counts them."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # ended meanwhile
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:  # its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def ended(self) -> str | None:
        """Return how it ended, or does so within a moment, as connections are closed before; None if it has not."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        return None if self.process.returncode is None else self.last_words()

    def last_words(self) -> str:
        """Return how it ended, if it has, and what it printed last, of errors alone if there are any."""
        code = self.process.poll()
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line or " must " in line]
        said = " ".join((errors or lines)[-LAST_LINES:])[-LONGEST:] or "nothing was printed"
        return f"{'no end' if code is None else f'exit code {code}'}: {said}"


def running_server(url: str) -> tuple[Server, str]:
    """Return a server that runs already, and its release of vLLM. A key that it wants is in OPENAI_API_KEY.

    Args:
        url: Of the server, with or without the protocol's "/v1".

    Raises:
        UserError: there is no server of vLLM's.
    """
    address, key = address_of(url), api_key()
    try:
        server = Server(address, str(_asked(f"{address}/v1/models", key)["data"][0]["id"]), key)
        version = str(_asked(f"{address}/version", key)["version"])
        server.cached_tokens()
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        got = f"{address}: {one_line(error, with_type=True)}"
        raise UserError(f"--serve must be a server of vLLM's, with its figures under /metrics, got {got}") from error
    return server, version


def _asked(url: str, key: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextmanager
def serve(
    directory: Path, dtype: str, options: Sequence[str], log: Path, start_seconds: float
) -> Iterator[StartedServer]:
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
        server = StartedServer(f"http://127.0.0.1:{port}", process, log)
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
