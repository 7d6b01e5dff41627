"""Speech by espeak-ng, from the library in the package espeakng-loader: the same samples for the same request."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from palkernels.bench.study.sounds import espeak_worker
from palkernels.errors import one_line

__all__ = ["LARGEST_DATA_PATH", "Speaker", "SpeechError"]

LARGEST_DATA_PATH = 150  # bytes: espeak-ng keeps its folder's path in 160 with what it appends, and cuts longer ones
RATES = (80, 450)  # words a minute that espeak-ng takes


class SpeechError(RuntimeError):
    """espeak-ng did not speak."""


class Speaker:
    """espeak-ng in a process of its own, which `with` ends. Several threads may share one: they take turns.

    An utterance depends on its request alone, not on what was spoken before (`espeak_worker` says how).

    Raises:
        ModuleNotFoundError: The package espeakng-loader is missing; the message says what to install.
        SpeechError: The library does not start.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        library, self._data = _paths()
        command = [sys.executable, "-I", espeak_worker.__file__, library, str(self._data)]
        # In a session of its own: a terminal's Ctrl-C is for the caller, whose end closes the pipe and ends this, too.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        try:
            self.rate = int(self._answer())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Speaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process. A closed speaker speaks no more."""
        with self._turn:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def speak(
        self, text: str, voice: str, *, rate: int = 160, pitch: int = 50, range: int = 50
    ) -> npt.NDArray[np.float64]:
        """Return an utterance as (samples,) in [-1, 1) at `self.rate` Hz.

        Args:
            text: What is said.
            voice: A language or an accent of espeak-ng, such as "en-gb", with a variant or without: "en-gb+f3".
            rate: Words a minute, 80 to 450.
            pitch: 0 to 99; 50 is the voice's own.
            range: How much the pitch moves, 0 to 99; 50 is the voice's own, 0 a monotone.

        Raises:
            ValueError: A value is out of bounds, or there is no such variant.
            SpeechError: The library refused, or ended.
        """
        if not text.strip() or "\0" in text:
            raise ValueError(f"text must hold something to say and no zero byte, got {text!r}")
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"rate must be from {RATES[0]} to {RATES[1]} words a minute, got {rate}")
        for name, value in (("pitch", pitch), ("range", range)):
            if not 0 <= value <= 99:
                raise ValueError(f"{name} must be from 0 to 99, got {value}")
        variant = voice.partition("+")[2]
        if (
            variant and not (self._data / "voices" / "!v" / variant).is_file()
        ):  # espeak-ng would leave it out in silence
            raise ValueError(f"voice must end with a variant that espeak-ng has, got {voice!r}")
        request = {"voice": voice, "text": text, "rate": int(rate), "pitch": int(pitch), "range": int(range)}
        with self._turn:
            try:
                content = self._ask(json.dumps(request).encode() + b"\n")
            except SpeechError:
                raise
            except BaseException:  # interrupted: the answer, still to come, must not pass for the next request's
                self._process.kill()
                raise
        return np.frombuffer(content, "=i2").astype(np.float64) / 32768

    def _ask(self, line: bytes) -> bytes:
        pipe = self._process.stdin
        assert pipe is not None
        if pipe.closed:
            raise SpeechError("the speaker must be open to speak, got a closed one")
        try:
            pipe.write(line)
            pipe.flush()
        except BrokenPipeError as error:
            raise SpeechError(f"espeak-ng's process must be running, got exit code {self._process.wait()}") from error
        return self._answer()

    def _answer(self) -> bytes:
        pipe = self._process.stdout
        assert pipe is not None
        header = _exactly(pipe, espeak_worker.HEADER_BYTES)
        content = _exactly(pipe, int.from_bytes(header[4:], "little")) if header else None
        if header is None or content is None:
            raise SpeechError(f"espeak-ng's process must answer, got its end with exit code {self._process.wait()}")
        if int.from_bytes(header[:4], "little") != 0:
            raise SpeechError(content.decode(errors="replace"))
        return content


def _exactly(pipe: IO[bytes], count: int) -> bytes | None:
    """Return the next `count` bytes, or None if the pipe ends before."""
    content = pipe.read(count)
    return content if len(content) == count else None


def _paths() -> tuple[str, Path]:
    """Return where the package has the library and espeak-ng's data."""
    try:
        loader: Any = importlib.import_module("espeakng_loader")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"spoken sounds need espeakng-loader: pip install 'palkernels[demo]' ({one_line(error)})",
            name="espeakng_loader",
        ) from error
    data = Path(loader.get_data_path())
    if len(bytes(data)) > LARGEST_DATA_PATH:
        raise SpeechError(
            f"the path of espeak-ng's data must have at most {LARGEST_DATA_PATH} bytes, got {len(bytes(data))}: "
            f"{str(data)!r}. Install espeakng-loader into an environment with a shorter path"
        )
    return str(loader.get_library_path()), data
