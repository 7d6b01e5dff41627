"""The process of a command: what Ctrl-C does to it, and what it can write."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "INTERRUPTED",
    "TERMINATED",
    "clean_up_when_ended",
    "console",
    "exit_with",
    "is_the_program",
    "signal_seen",
    "take_signals",
    "write_to_any_terminal",
]

INTERRUPTED = 130  # a shell's exit code for Ctrl-C
TERMINATED = 143  # and for SIGTERM, which batch systems send at a time limit
ENDINGS = {signal.SIGINT: ("interrupted", INTERRUPTED), signal.SIGTERM: ("terminated", TERMINATED)}


class _State:
    taken = False  # whether the signals are ours
    cleans_up = False  # whether something has begun that must be cleaned up
    seen: signal.Signals | None = None


def is_the_program(frame: FrameType) -> bool:
    """Return whether a frame is called, or its module imported, by the outermost code of a program, or of a module that
    ``python -m`` runs."""
    caller = _outside(frame.f_back, "<frozen importlib")
    return caller is not None and _outside(caller.f_back, "<frozen runpy") is None


def _outside(frame: FrameType | None, machinery: str) -> FrameType | None:
    """Return the innermost frame, from one on outwards, that is not of Python's own machinery."""
    while frame is not None and frame.f_code.co_filename.startswith(machinery):
        frame = frame.f_back
    return frame


def take_signals() -> None:
    """End the process at Ctrl-C and SIGTERM, at any time and in one line.

    Until `clean_up_when_ended` it ends at once: an exception amid imports may be lost, or come out as another one. This
    also holds where the process was started with Ctrl-C ignored, as shells start what runs in the background, or
    blocked: whatever sends it the signal means it.
    """
    _State.taken = True
    for number in ENDINGS:
        signal.signal(number, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)


def clean_up_when_ended() -> None:
    """From here on let Ctrl-C and SIGTERM raise KeyboardInterrupt, so that what has begun is cleaned up."""
    if not _State.taken:
        return
    _State.cleans_up = True
    shown_before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if _State.seen is None or not isinstance(unraisable.exc_value, KeyboardInterrupt):
            shown_before(unraisable)
            return
        # Raised where Python drops exceptions, such as in a destructor: once more, a little later.
        again = threading.Timer(0.05, os.kill, (os.getpid(), _State.seen))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def signal_seen() -> tuple[str, int] | None:
    """Return the message and the exit code of the signal that ended the command, or None if none has."""
    return None if _State.seen is None else ENDINGS[_State.seen]


def write_to_any_terminal() -> None:
    """Let stdout and stderr replace the characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def console() -> Console:
    """Return stdout for tables. Into a pipe or a log rich would assume 80 columns, in which not all of them fit."""
    from rich.console import Console  # which --help need not wait for

    return Console() if sys.stdout.isatty() else Console(width=140)


def exit_with(code: int, message: str | None = None) -> NoReturn:
    """End the command, with a message in one line on stderr if it failed."""
    if _State.taken:  # it ends in any case, and Python shows a traceback of what comes while it does
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)
    if message is not None:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number)
    if _State.cleans_up:
        _State.seen = name
        raise KeyboardInterrupt
    message, code = ENDINGS[name]
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: the signal came amid a write
        sys.stdout.flush()
    os.write(2, f"error: {message}\n".encode())
    os._exit(code)
