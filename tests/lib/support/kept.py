"""What a server keeps: of requests in vLLM's worker, of memory and files in its processes."""

import json
import urllib.request
from typing import Any, NamedTuple

import psutil


class WorkerExtension:
    """Methods that vLLM's worker gets by --worker-extension-cls, and that /collective_rpc calls."""

    model_runner: Any

    def kept(self) -> dict[str, int]:
        """How many requests the worker knows, and how many audio tokens its encoder cache holds."""
        runner = self.model_runner
        return {"requests": len(runner.requests), "tokens": sum(map(len, runner.encoder_cache.values()))}


def kept_by_worker(port: int) -> dict[str, int]:
    """What :meth:`WorkerExtension.kept` returns."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/collective_rpc",
        data=json.dumps({"method": "kept"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        (worker,) = json.load(answer)["results"]
    return dict(worker)


class Held(NamedTuple):
    """What a server's processes hold together."""

    memory: int  # bytes that no other process shares
    files: int
    threads: int


def held_by(pid: int) -> Held:
    """Return what a process and those that it started hold."""
    parent = psutil.Process(pid)
    processes = [parent, *parent.children(recursive=True)]
    return Held(
        sum(process.memory_full_info().uss for process in processes),
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
    )
