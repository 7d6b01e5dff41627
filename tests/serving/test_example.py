"""The example starts a server, asks it, stops it, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

from support.served import quiet_environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"


def test_the_example_asks_a_server_and_stops_it(tmp_path, monkeypatch):
    quiet_environment()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    done = subprocess.run(
        [sys.executable, "-P", EXAMPLE], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, last = done.stdout.splitlines()[-3:]
    assert first.startswith("What do you hear? ")
    assert "tokens of text and sound in the prompt" in second
    assert last == "stopped"
    assert list(tmp_path.iterdir()) == []
