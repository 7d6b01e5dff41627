"""One sample: a conversation with clips, and what to call it in lists and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Message", "Sample"]

Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A conversation that ends with the answer to learn, or to compare with.

    Attributes:
        messages: As ``PalProcessor.apply_chat_template`` takes them, each clip as {"type": "audio", "audio": ...} in a
            message's content. A clip is a path, or what else the processor takes, and has not been read.
        source: Where it stands, as in "calls.jsonl:17".
        task: What tables of accuracy call its kind; "": it has none.
        choices: The answers to choose among; (): it is an open question.
    """

    messages: tuple[Message, ...]
    source: str
    task: str = ""
    choices: tuple[str, ...] = ()

    def clips(self) -> tuple[Any, ...]:
        """Return the clips of all messages in their order."""
        contents = [message.get("content") for message in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return tuple(part["audio"] for part in parts if part["type"] == "audio")
