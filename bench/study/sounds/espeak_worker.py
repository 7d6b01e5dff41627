"""The process that speaks with espeak-ng: `python espeak_worker.py LIBRARY DATA`, run by `espeak.Speaker`.

The library keeps phases, filters and random numbers from one utterance to the next and cannot be reset, not even by
ending and starting it anew, so the same text would sound a little different after another one. Here each utterance is
spoken by a child that was forked before the library had spoken at all. A crash of the library ends that child alone,
and the caller's locale and the C library's random numbers, which espeak-ng changes, stay as they are.

Reads a JSON object a line from stdin: voice, text, rate (words a minute), pitch and range (0 to 99). Answers on stdout
with a header of two little-endian int32, status and number of bytes, and then either 16-bit samples (status 0) or a
message in UTF-8 (status 1). The first answer comes unasked: the sample rate as text, or why the library did not start.
Imports nothing but Python's own modules, so that the process is small and forks fast.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any, BinaryIO

HEADER_BYTES = 8
SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: espeak_Synth returns when all samples went to the callback
DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: an error is returned
UTF8 = 1  # espeakCHARS_UTF8
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class Library:
    """libespeak-ng, started; `rate` in Hz is that of its samples."""

    def __init__(self, path: str, data: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self._library.espeak_ng_SetVoiceByName.argtypes = [ctypes.c_char_p]
        self._library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self._library.espeak_SetSynthCallback.restype = None
        self._library.espeak_ng_GetStatusCodeMessage.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
        self._library.espeak_ng_GetStatusCodeMessage.restype = None
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self.rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(data), DONT_EXIT)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng must start with the data in {data!r}, got {self.rate}")
        self._pieces: list[bytes] = []
        self._callback = CALLBACK(self._take)  # the library calls it until the process ends
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    def speak(self, *, voice: str, text: str, rate: int, pitch: int, range: int) -> bytes:
        """Return the 16-bit samples of a text."""
        self._check(self._library.espeak_ng_SetVoiceByName(voice.encode()), f"the voice {voice!r}")
        self._check(self._library.espeak_ng_SetRandSeed(1), "a seed")
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, range)):
            self._check(self._library.espeak_SetParameter(parameter, value, 0), f"parameter {parameter} of {value}")
        self._pieces.clear()
        said = text.encode()
        self._check(self._library.espeak_Synth(said, len(said) + 1, 0, 1, 0, UTF8, None, None), f"the text {text!r}")
        if not self._pieces:
            raise RuntimeError(f"espeak-ng must give samples for the text {text!r} in the voice {voice!r}, got none")
        return b"".join(self._pieces)

    def _check(self, status: int, what: str) -> None:
        if status == 0:
            return
        message = ctypes.create_string_buffer(512)
        self._library.espeak_ng_GetStatusCodeMessage(status, message, len(message))
        raise RuntimeError(f"espeak-ng must take {what}, got {message.value.decode(errors='replace') or hex(status)}")


def in_a_child(library: Library, request: dict[str, Any]) -> tuple[int, bytes]:
    """Return the status and the content of the answer that a forked child gives."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.close(reading)
            try:
                status, content = 0, library.speak(**request)
            except Exception as error:
                status, content = 1, str(error).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(content)
            code = status
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (0, 1):
        return code, content
    return 1, f"espeak-ng must speak {request['text']!r}, got exit code {code} of its process".encode()


def answer(out: BinaryIO, status: int, content: bytes) -> None:
    """Write one answer."""
    out.write(status.to_bytes(4, "little") + len(content).to_bytes(4, "little") + content)
    out.flush()


def main(path: str, data: str) -> int:
    """Answer requests until there are no more. Returns the exit code."""
    requests, out = sys.stdin.buffer, sys.stdout.buffer
    try:
        library = Library(path, data)
    except (OSError, AttributeError, RuntimeError) as error:
        answer(out, 1, str(error).encode())
        return 1
    answer(out, 0, str(library.rate).encode())
    for line in requests:
        answer(out, *in_a_child(library, json.loads(line)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except BrokenPipeError:  # who asked has ended
        os._exit(1)
