"""What the tests of serving share: saved models, and what Hugging Face answers. They need vLLM: make test-serving."""

import functools
import http.server
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
from support import served
from support.limits import pytest_runtest_protocol, restore_default_signals
from support.servers import free_port, server

__all__ = ["pytest_runtest_protocol"]  # every test's limit of time

restore_default_signals()
served.quiet_environment()


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A function from a model's name to its directory, made once."""
    made = {}

    def get(name, family="llama"):
        if (name, family) not in made:
            made[name, family] = served.make(tmp_path_factory.mktemp(f"{name}-{family}"), name, family)
        return made[name, family]

    return get


@pytest.fixture(scope="session")
def reference(directory):
    """A function from a model's name to the model as Hugging Face runs it."""
    made = {}

    def get(name, family="llama"):
        if (name, family) not in made:
            made[name, family] = served.Reference(directory(name, family))
        return made[name, family]

    return get


class Running(NamedTuple):
    """A server's process, and where it is."""

    process: subprocess.Popen
    port: int
    log: Path
    files: Path  # where clips are that it may read

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"


# So that a load of some 16 requests has all that may go wrong: prompts in chunks, requests that are put off for others'
# blocks, and caches that forget.
TIGHT = {
    "--max-num-seqs": 8,
    "--max-num-batched-tokens": 256,
    "--num-gpu-blocks-override": 34,
}


@pytest.fixture(scope="session")
def running(directory, tmp_path_factory):
    """A server for all tests: its start takes longer than they do."""
    port, place = free_port(), tmp_path_factory.mktemp("server")
    files = place / "files"
    files.mkdir()
    options = [str(word) for option in TIGHT.items() for word in option]
    options += ["--allowed-local-media-path", str(files), "--allowed-media-domains", "127.0.0.1"]
    options += ["--enable-mm-embeds", "--worker-extension-cls", "support.kept.WorkerExtension"]
    with server(directory("lal"), port, place / "log", *options) as process:
        yield Running(process, port, place / "log", files)


@pytest.fixture(scope="session")
def site(running):
    """The address of a server of the files that the model's server may read."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Say nothing."""

    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=running.files))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{files.server_port}"
    files.shutdown()
    files.server_close()
