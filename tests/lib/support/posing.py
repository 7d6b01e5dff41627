"""A Python for the stages of bench/gpu.sh on a machine without a GPU: each takes its own way, on a CPU and in small.

`posing` writes a program that stands in for Python. What it is given runs in a process forked from one that has
imported everything, with the options of a stage as they are and those behind them that make it small: of an option that
is given twice, the last one holds.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

GPU = "NVIDIA H100 80GB HBM3"
CLIENT = """#!{python} -ISE
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
signal.signal(signal.SIGINT, lambda *_: server.send(b"I"))
asked = json.dumps({{"words": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "big")], [1, 2])
server.sendall(asked)
sys.exit(int(server.recv(8) or b"1"))
"""
TEST = "tests/attention/test_repeated.py"


def small(words: list[str], model: str) -> list[str]:
    """Return a stage's command for a CPU, in small."""
    words = ["cpu" if word == "cuda" else word for word in words]
    if "figure1" in words:
        sizes = ["--text-tokens", "16", "--new-tokens", "2", "--repeats", "2", "--dtype", "fp32"]
        counts = "16" if "--compiled" in words else "16,256"
        sizes += ["--clip-seconds", "none", "--methods", "plits,lal", "--audio-tokens", counts, "--model", model]
        resume = [word for word in words if word == "--resume"]
        return [*(word for word in words if word != "--resume"), *sizes, *resume]
    if "--host" in words:
        return [*words, "--seconds", "0.001"]
    if "--sweep" in words:
        return [*words, "--model", "smollm2-135m", "--compile-only"]
    if "microbench" in words:
        chosen = [] if "--op" in words else ["--op", "forward", "--op", "decode"]
        sizes = ["--audio-tokens", "8", "--model", "smollm2-135m", "--peers", "sdpa"]
        return [*words, "--seconds", "0.001", *chosen, *sizes]
    if "pytest" in words:
        return [*(word for word in words if not word.startswith("tests/")), "--numprocesses", "0", TEST]
    return [*words, "--device", "cpu", "--cases", "1"] if words == ["scripts/launches.py"] else words


@contextlib.contextmanager
def posing(folder: Path, model: Path) -> Iterator[Path]:
    """The program that stands in for Python; Figure 1 is measured on the model in a directory."""
    with tempfile.TemporaryDirectory() as short:  # an address has 107 characters at most
        address = f"{short}/server"
        client = folder / "python"
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        command = [sys.executable, "-m", __name__, address, str(model)]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment) as server:
            try:
                while not os.path.exists(address):
                    assert server.poll() is None, "the server must start"
                    time.sleep(0.01)
                yield client
            finally:
                server.kill()


def _serve(address: str, model: str) -> None:
    import transformers
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.models.whisper.modeling_whisper  # noqa: F401

    from palkernels.bench.experiments import compiled
    from palkernels.bench.kernels import sweep
    from support.commands import without_pictures
    from support.interpreter import make_quick

    # What a compiler would make of it takes half a minute.
    compiled.CompileConfig = functools.partial(compiled.CompileConfig, backend="eager")
    sweep.compile_all = lambda kernel, arch, dtype, head_dim, chosen, processes: ((tile, []) for tile in chosen)
    make_quick()
    without_pictures()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address + ".new")
    listening.listen()
    os.rename(address + ".new", address)
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            os._exit(_run(connection, model))
        connection.close()


def _run(connection: socket.socket, model: str) -> int:
    size, (out, errors), _, _ = socket.recv_fds(connection, 8, 2)
    asked = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    os.dup2(out, 1)
    os.dup2(errors, 2)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"] | {"TRITON_INTERPRET": "1"})
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_follow, args=(connection,), daemon=True).start()
    code: int | str | None = 0
    try:
        _run_python(small(asked["words"], model))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(code, str):
        os.write(2, code.encode())
    number = code if isinstance(code, int) else 0 if code is None else 1
    connection.send(str(int(number)).encode())
    return number


def _follow(connection: socket.socket) -> None:
    """End as the program that stands in: interrupted, or killed."""
    while connection.recv(1) == b"I":
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGKILL)


def _run_python(words: list[str]) -> None:
    import torch

    torch.cuda.get_device_name = lambda *_: GPU  # that the stages are asked for is there
    how, *rest = words
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif how == "-m" and rest[0] == "pip":
        if "--target" in rest:
            zipfile.ZipFile(rest[-1]).extractall(rest[rest.index("--target") + 1])
    elif how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    _serve(*sys.argv[1:])
