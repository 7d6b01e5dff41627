"""Files of JSON records: one object a line (JSONL), or one array of objects (JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from palkernels.errors import one_line
from palkernels.model.data.reasons import NOT_JSON, RejectedError

__all__ = ["Record", "records_of"]


class Record(NamedTuple):
    """A row of a file: where it stands, a line of JSONL ("17") or an item of an array ("item 3"), counted from 1; and
    its object or what it lacks."""

    place: str
    value: dict[str, Any] | RejectedError


def records_of(path: Path) -> Iterator[Record]:
    """Yield a file's rows in order, those that are no JSON object as :class:`RejectedError`. Blank lines are none.

    The text is UTF-8, with a byte order mark or not; lines end with LF or CRLF. NaN and infinities are read as Python
    writes them.

    Raises:
        ValueError: The file cannot be read, or begins with something else than an object or an array of them, or the
            array is broken; the message names the line.
    """
    try:
        with open(path, "rb") as file:
            begun = False
            for number, line in enumerate(file, 1):
                text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if not text:
                    continue
                if not begun and text.startswith(b"["):
                    yield from _items(path, text + b"\n" + file.read(), number)
                    return
                if not begun and not text.startswith(b"{"):
                    raise _foreign(path, number, text)
                begun = True
                yield Record(str(number), _object(text))
    except OSError as error:
        raise ValueError(
            f"{path.name} must be a file that can be read, got {error.strerror or error}: {path}"
        ) from error


def _object(text: bytes) -> dict[str, Any] | RejectedError:
    """Return a line's object."""
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        return RejectedError(NOT_JSON, "a line must be UTF-8, got other bytes")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError, too
        return RejectedError(NOT_JSON, f"a line must be a JSON object, got {one_line(error, with_type=True)}")
    return _checked(value)


def _checked(value: Any) -> dict[str, Any] | RejectedError:
    if isinstance(value, dict):
        return value
    return RejectedError(NOT_JSON, f"a row must be a JSON object, got a {type(value).__name__}")


def _items(path: Path, content: bytes, line: int) -> Iterator[Record]:
    """Yield the items of an array that begins in ``line`` and is the whole rest of a file."""
    try:
        items = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{path.name}:{line} must be UTF-8, got other bytes") from error
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(f"{path.name}:{line} must go on with a JSON array of objects, got {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.name}:{line} must be a JSON array of objects, got {one_line(error, with_type=True)}"
        ) from error
    for number, item in enumerate(items, 1):
        yield Record(f"item {number}", _checked(item))


def _foreign(path: Path, line: int, text: bytes) -> ValueError:
    got = text[:40].decode("utf-8", "backslashreplace")
    return ValueError(f"{path.name}:{line} must be a JSON object a line, or begin an array of them, got {got!r}")
