"""Rows that hold a conversation and its clips.

The forms in which trainers take them, and the same sample in each:

    ms-swift            {"messages": [{"role": "user", "content": "<audio>Which word?"},
                                      {"role": "assistant", "content": "red"}], "audios": ["a.wav"]}
    LLaMA-Factory       {"conversations": [{"from": "human", "value": "<audio>Which word?"},
    (sharegpt)                             {"from": "gpt", "value": "red"}], "audios": ["a.wav"], "system": "..."}
    Qwen2-Audio, and    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"},
    transformers                       {"type": "text", "text": "Which word?"}]}, ...]}

``<audio>`` in a text, and {"type": "audio"} without a clip of its own, stand for the next of ``audios`` (or ``audio``:
one or a list). "task" and "choices" are ours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palkernels.model.data.reasons import AUDIO_COUNT, AUDIO_MISSING, MALFORMED, NO_ANSWER, RejectedError
from palkernels.model.data.sample import Message, Sample

__all__ = ["AUDIO_MARK", "conversation", "located", "text_of"]

AUDIO_MARK = "<audio>"
SPEAKERS = {  # sharegpt's names, LLaMA-Factory's for tools among them
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "tool": "tool",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
CLIP_KEYS = ("audio", "path", "url", "audio_url")  # under which a part may hold its clip


def conversation(record: Mapping[str, Any], folder: Path, source: str, task: str = "") -> Sample:
    """Return the sample of one row.

    Args:
        record: The row.
        folder: Where relative paths of clips start.
        source: Where the row stands.
        task: Of rows that name none.

    Raises:
        RejectedError: The row holds no conversation that ends with an answer, or not as many clips as it marks.
    """
    name = "messages" if record.get("messages") is not None else "conversations"
    turns = record.get(name)
    if not isinstance(turns, list) or not turns:
        raise RejectedError(MALFORMED, f"messages must be a list of at least one, got {_kind(turns)}")
    clips = _clips_of(record, folder)
    remaining = iter(clips)
    messages = [_message(turn, remaining, folder) for turn in turns]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": text_of(record["system"], "system")})
    if left := sum(1 for _ in remaining):
        marks = len(clips) - left
        raise RejectedError(AUDIO_COUNT, f"texts must hold {AUDIO_MARK} for each of {len(clips)} audios, got {marks}")
    last = messages[-1]
    if last["role"] != "assistant":
        raise RejectedError(NO_ANSWER, f"the last message must be the assistant's, got the {last['role']}'s")
    if not _spoken(last["content"]):
        raise RejectedError(NO_ANSWER, "the last message must say something, got an empty answer")
    given = record.get("task")
    return Sample(
        tuple(messages),
        source,
        task if given in (None, "") else text_of(given, "task"),
        _choices(record.get("choices")),
    )


def located(clip: Any, folder: Path) -> Any:
    """Return a clip as a path on this machine, or as bytes.

    Args:
        clip: A path, or a dict with "path" or "bytes" as the Audio columns of ``datasets`` have it.
        folder: Where a relative path starts.

    Raises:
        RejectedError: It is neither, or an address, from which nothing is downloaded.
    """
    if isinstance(clip, Mapping):
        if isinstance(clip.get("bytes"), bytes):
            return clip["bytes"]
        clip = clip.get("path") or clip.get("url")
    if clip is None or clip == "":
        raise RejectedError(AUDIO_MISSING, "audio must be a path, got none")
    if not isinstance(clip, str | os.PathLike):
        raise RejectedError(MALFORMED, f"audio must be a path, got {_kind(clip)}")
    path = os.fspath(clip)
    if "://" in path and not path.startswith("file://"):
        raise RejectedError(AUDIO_MISSING, f"audio must be a file on this machine, got the address {path!r}")
    return str(folder / path.removeprefix("file://"))


def text_of(value: Any, name: str) -> str:
    """Return a text, after checking that it is one that can be encoded.

    Raises:
        RejectedError: It is not.
    """
    if not isinstance(value, str):
        raise RejectedError(MALFORMED, f"{name} must be a string, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RejectedError(MALFORMED, f"{name} must be Unicode text, got half a surrogate pair") from error
    return value


def _kind(value: Any) -> str:
    """Return what an error calls a value of another type."""
    if value is None:
        return "none"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    return f"an empty {type(value).__name__}" if value in ([], {}) else f"a {type(value).__name__}"


def _clips_of(record: Mapping[str, Any], folder: Path) -> list[Any]:
    """Return the clips that a row lists beside its messages."""
    listed = record.get("audios")
    if listed is None:
        listed = record.get("audio")
    if listed is None:
        return []
    return [located(clip, folder) for clip in (listed if isinstance(listed, list) else [listed])]


def _message(turn: Any, remaining: Any, folder: Path) -> Message:
    """Return a turn as a message, with the next of the ``remaining`` clips wherever one is marked."""
    if not isinstance(turn, Mapping):
        raise RejectedError(MALFORMED, f"a message must be an object, got {_kind(turn)}")
    by_sharegpt = "from" in turn
    speaker, said = (turn["from"], turn.get("value")) if by_sharegpt else (turn.get("role"), turn.get("content"))
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise RejectedError(MALFORMED, f"a message's role must be one of {', '.join(SPEAKERS)}, got {speaker!r}")
    role = SPEAKERS[speaker]
    if said is None and role == "assistant":
        raise RejectedError(NO_ANSWER, "the assistant must say something, got none")
    content: str | list[Any]
    if isinstance(said, list):
        content = [part for item in said for part in _part(item, remaining, folder)]
    else:
        parts = _split(text_of(said, "a message's content"), remaining)
        content = parts if any(part["type"] == "audio" for part in parts) else str(said)
    names = ("from", "value") if by_sharegpt else ("role", "content")
    return {**{key: value for key, value in turn.items() if key not in names}, "role": role, "content": content}


def _part(item: Any, remaining: Any, folder: Path) -> list[Message]:
    """Return a part of a message's content, a text split at its marks."""
    if not isinstance(item, Mapping) or item.get("type") not in ("text", "audio"):
        got = item.get("type") if isinstance(item, Mapping) else _kind(item)
        raise RejectedError(MALFORMED, f'a part of content must be of type "text" or "audio", got {got!r}')
    if item["type"] == "text":
        return _split(text_of(item.get("text"), "a part's text"), remaining)
    clip = next((item[key] for key in CLIP_KEYS if item.get(key) is not None), None)
    return [{"type": "audio", "audio": _next(remaining) if clip is None else located(clip, folder)}]


def _split(text: str, remaining: Any) -> list[Message]:
    """Return a text as parts, with a clip in the place of each mark."""
    first, *rest = text.split(AUDIO_MARK)
    parts: list[Message] = [{"type": "text", "text": first}] if first or not rest else []
    for piece in rest:
        parts.append({"type": "audio", "audio": _next(remaining)})
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _next(remaining: Any) -> Any:
    clip = next(remaining, None)
    if clip is None:
        raise RejectedError(AUDIO_COUNT, f"audios must hold a clip for each {AUDIO_MARK}, got fewer")
    return clip


def _spoken(content: str | list[Any]) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] == "text" and part["text"].strip() for part in content)


def _choices(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RejectedError(MALFORMED, f"choices must be a list of strings, got {_kind(value)}")
    return tuple(text_of(choice, "a choice") for choice in value)
