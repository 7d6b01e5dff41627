"""A conversation with a server that speaks OpenAI's protocol, as vLLM does. The server keeps nothing between turns:
each request brings the whole conversation, and what it has of clips and texts from earlier ones it finds by itself."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from palkernels.bench.endpoint import address_of, api_key
from palkernels.bench.errors import UserError, one_line

__all__ = ["ServedConversation"]


class ServedConversation:
    """Questions to the model of a server, one after another.

    Args:
        url: Of the server, with or without the protocol's "/v1".
        clips: Files that are heard before the first question, sent as they are.

    Raises:
        UserError: The client's package is missing, a file cannot be read, or there is no such server.
    """

    def __init__(self, url: str, clips: Sequence[Path]) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            raise UserError("--serve needs the package openai: pip install 'palkernels[client]'") from error
        # What is no OpenAI server may answer anything, which the client takes apart without a look.
        self.refused: tuple[type[Exception], ...] = openai.OpenAIError, ValueError, TypeError, AttributeError
        self.url = f"{address_of(url)}/v1"
        self.clips = [_part(path) for path in clips]
        self.messages: list[Any] = []
        try:
            self.client = openai.OpenAI(base_url=self.url, api_key=api_key())
            self.model = next(iter(self.client.models.list())).id
        except Exception as error:  # a URL that is none raises classes of the client's own client
            raise UserError(f"--serve must be a server that lists a model, got {self.url}: {_said(error)}") from error

    def ask(self, question: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the answer to a further question, piece by piece.

        Raises:
            UserError: The server refuses the request.
        """
        heard = [] if self.messages else self.clips
        messages = [*self.messages, {"role": "user", "content": [*heard, {"type": "text", "text": question}]}]
        said = ""
        try:
            for piece in self.client.chat.completions.create(
                model=self.model, messages=messages, max_completion_tokens=max_new_tokens, temperature=0, stream=True
            ):
                text = piece.choices[0].delta.content if piece.choices else None
                if text:
                    said += text
                    yield text
        except self.refused as error:
            raise UserError(f"the server refused: {_said(error)}") from error
        self.messages = [*messages, {"role": "assistant", "content": said}]


def _part(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"audio file {str(path)!r} must be readable, got {one_line(error)}") from error
    data = base64.b64encode(content).decode("ascii")
    return {"type": "input_audio", "input_audio": {"data": data, "format": path.suffix.lower().lstrip(".") or "wav"}}


def _said(error: Exception) -> str:
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return one_line(message) if isinstance(message, str) else one_line(error, with_type=True)
