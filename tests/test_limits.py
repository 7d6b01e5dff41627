"""What holds for every test: a limit of time, for its processes too, and signals that reach them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = """
import subprocess, sys, time
import pytest
from support.limits import child

SLEEP = [sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"]

@pytest.fixture
def slow():
    time.sleep(600)

def test_itself():
    time.sleep(600)

def test_shared(slow):
    pass

def test_run(tmp_path):
    subprocess.run([*SLEEP, "run.pid"], check=True)

def test_child(tmp_path):
    with child([*SLEEP, "child.pid"]) as process:
        process.stdout.readline()

def test_quick():
    pass
"""


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_test_without_an_end_fails_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from support.limits import pytest_runtest_protocol\n")
    (tmp_path / "test_slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_slow.py"]
    environment = os.environ | {"PALKERNELS_TEST_SECONDS": "3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert "1 passed" in done.stdout
    for name in ("itself", "shared", "run", "child"):
        assert f"test_slow.py::test_{name} must end within 3 s, got no end" in done.stdout
    for name in ("run", "child"):
        assert not alive(int((tmp_path / f"{name}.pid").read_text()))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a system without Unix signals")
def test_tests_in_the_background_start_processes_that_can_be_interrupted(tmp_path: Path) -> None:
    """As `nohup make test &` starts them: with Ctrl-C ignored, which processes inherit."""
    (tmp_path / "conftest.py").write_text("from support.limits import restore_default_signals as r\n\nr()\n")
    (tmp_path / "test_signal.py").write_text("""
import signal, subprocess, sys

def test_interrupted():
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"], stdout=-1)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
""")
    pytest_ = f"{sys.executable} -m pytest -q -p no:cacheprovider --rootdir . test_signal.py"
    shell = ["sh", "-c", f"trap '' INT; {pytest_}"]
    start = time.monotonic()
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "1 passed" in done.stdout, (done.stdout, time.monotonic() - start)
