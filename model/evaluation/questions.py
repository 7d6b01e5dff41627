"""Samples as questions: what a model is asked, and what it should say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palkernels.model.data import Sample
from palkernels.model.data.reasons import NO_ANSWER
from palkernels.model.data.sample import Message
from palkernels.model.evaluation.normalisation import normalised

__all__ = ["Question", "batches", "question_of", "why_not"]

NOT_A_CHOICE = "answer not among the choices"  # what samples are counted under
CLIP = "<audio>"  # what stands for a clip in a question's text


@dataclass(frozen=True)
class Question:
    """A sample's conversation up to its last answer, and that answer.

    Attributes:
        number: the sample's, among those that were given.
        messages: the conversation without its last answer.
        reference: the last answer.
    """

    number: int
    sample: Sample
    messages: tuple[Message, ...]
    reference: str

    @property
    def text(self) -> str:
        """What the last message that is not the assistant's says, with ``<audio>`` for each clip."""
        asked = [message for message in self.messages if message["role"] != "assistant"]
        return text_of(asked[-1]) if asked else ""


def why_not(sample: Sample) -> tuple[str, str] | None:
    """Return what a sample that cannot be asked is counted under, and what is wrong with it; None if it can be."""
    if len(sample.messages) < 2 or sample.messages[-1].get("role") != "assistant":
        roles = ", ".join(str(message.get("role")) for message in sample.messages) or "none"
        return NO_ANSWER, f"messages must end with the assistant's answer to a question, got {roles}"
    reference = text_of(sample.messages[-1])
    if not reference.strip():
        return NO_ANSWER, "the answer to compare with must be a text, got none"
    if sample.choices and normalised(reference) not in map(normalised, sample.choices):
        choices = ", ".join(map(repr, sample.choices))
        return NOT_A_CHOICE, f"the answer must be one of the choices {choices}, got {reference!r}"
    return None


def question_of(number: int, sample: Sample) -> Question:
    """Return the question that a sample is, for which :func:`why_not` returns None."""
    return Question(number, sample, sample.messages[:-1], text_of(sample.messages[-1]).strip())


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Return all questions in batches of like length, the longest first: what memory must hold shows at once.

    Questions with choices, which are asked in another way, too, share no batch with others.
    """
    of_kind: dict[bool, list[Question]] = {}
    for question in questions:
        of_kind.setdefault(bool(question.sample.choices), []).append(question)
    found = []
    for alike in of_kind.values():
        ordered = sorted(alike, key=_length, reverse=True)
        found += [ordered[first : first + size] for first in range(0, len(ordered), size)]
    return found


def text_of(message: Message) -> str:
    """Return what a message says, with ``<audio>`` for each clip."""
    return "".join(CLIP if part.get("type") == "audio" else str(part.get("text") or "") for part in _parts(message))


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _length(question: Question) -> tuple[int, int]:
    """Return something that grows with the length of a question's clips, and the length of its text."""
    texts = sum(len(text_of(message)) for message in question.messages)
    return sum(map(_size, question.sample.clips())), texts


def _size(clip: Any) -> int:
    """Return the size of a clip that has not been read: of a file in bytes, else as many as it has of what it is."""
    if isinstance(clip, str | os.PathLike):
        try:
            return os.stat(clip).st_size
        except OSError:  # why it cannot be read is said when it is
            return 0
    samples: Any = clip.get("array", clip.get("bytes", b"")) if isinstance(clip, dict) else clip
    return len(samples) if hasattr(samples, "__len__") else 0
