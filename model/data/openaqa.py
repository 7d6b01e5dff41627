"""OpenAQA's rows, as LTU and LTU-AS (Gong et al.) are trained on and publish: one question about one clip.

    {"instruction": "What does the bell sound like?", "input": "", "audio_id": "audio/x.flac", "dataset": "clotho",
     "task": "open_ended_question", "output": "It is bright and short."}

The clip stands first, as in LTU's prompts. ``input``, where it is not empty, follows the instruction in a paragraph of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palkernels.model.data.conversations import located, text_of
from palkernels.model.data.reasons import NO_ANSWER, RejectedError
from palkernels.model.data.sample import Message, Sample

__all__ = ["question"]


def question(record: Mapping[str, Any], folder: Path, source: str, task: str = "") -> Sample:
    """Return the sample of one row.

    Args:
        record: The row.
        folder: Where a relative ``audio_id`` starts.
        source: Where the row stands.
        task: Of rows that name none.

    Raises:
        RejectedError: The row lacks clip or answer, or a value is no text.
    """
    asked = text_of(record.get("instruction"), "instruction")
    if record.get("input"):
        asked += "\n\n" + text_of(record["input"], "input")
    if record.get("output") is None or not text_of(record["output"], "output").strip():
        raise RejectedError(NO_ANSWER, "output must say something, got an empty answer")
    parts: list[Message] = [{"type": "audio", "audio": located(record.get("audio_id"), folder)}]
    parts += [{"type": "text", "text": asked}] if asked else []
    messages = {"role": "user", "content": parts}, {"role": "assistant", "content": record["output"]}
    return Sample(messages, source, text_of(record.get("task") or task, "task"))
