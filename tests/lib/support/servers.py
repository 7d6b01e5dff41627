"""An OpenAI server of vLLM's in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 400  # to start; a busy machine is several times slower
# The C library keeps memory that was freed, and oneDNN what it made for each number of rows: a test that asks whether a
# server keeps anything of requests would see these.
KEEPS_NOTHING = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def server(directory: Path, port: int, log: Path, *options: str) -> Iterator[subprocess.Popen[Any]]:
    """A server that is ready, stopped at the end if it is still there. What it prints is in ``log``."""
    # Not `vllm serve`: that command asks for a package of the name vllm, which the build for CPUs has not.
    command = [
        sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--served-model-name", "pal", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4", "--block-size", "32",
        "--max-logprobs", "20", "--limit-mm-per-prompt", '{"audio": 2}', *options,
    ]  # fmt: skip
    environment = {
        **os.environ, **KEEPS_NOTHING, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=log.parent
        )
        try:
            deadline = time.monotonic() + SECONDS
            while not is_up(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the server must start, got:\n{log.read_text()[-4000:]}")
                time.sleep(1)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
