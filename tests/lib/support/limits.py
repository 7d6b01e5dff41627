"""Limits on tests and the processes that they start: a time, and signals that reach them.

A test that takes longer fails, and what it waits for is killed: `subprocess.run` kills its process where its wait is
broken off, and `child` does in any case.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

SECONDS = int(os.environ.get("PALKERNELS_TEST_SECONDS", "600"))  # for one test; a busy machine is several times slower
GRACE = 60  # seconds more before the process is ended where the test does not come back to Python


def restore_default_signals() -> None:
    """Let Ctrl-C end the tests where a shell started them in the background, and so with it ignored.

    Processes that tests start would inherit that. A handler they do not inherit: they get the default.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fail a test that takes longer than SECONDS, with what it shares and has to make first."""
    if threading.current_thread() is not threading.main_thread():
        return (yield)

    def give_up(*_: object) -> None:
        pytest.fail(f"{item.nodeid} must end within {SECONDS} s, got no end")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(SECONDS + GRACE, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def child(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process whose output is read as text, killed at the end if it is still there."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()
