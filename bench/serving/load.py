"""The client: questions about clips, some of them in flight at a time, and when each token of the answers came.

`vllm bench serve` puts the question before the clip, so that no two questions share a beginning, and takes its time of
a token from pieces of text, which random weights do not always give.
"""

from __future__ import annotations

import asyncio
import base64
import io
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.serving.server import Server
from palkernels.bench.serving.settings import Options, Point

__all__ = ["Answer", "Load", "messages", "run_load"]

RATE = 16_000  # Hz
TIMEOUT = 3600.0  # seconds for one answer


@dataclass
class Answer:
    """What one request got, and when.

    Attributes:
        first_token_seconds: From sending it to its first token.
        gaps: Seconds from each token to the next. Tokens that come together share the time since those before.
        tokens: Of the answer.
        prompt_tokens: Of the prompt, the clip's included.
    """

    first_token_seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Load:
    """All answers, and the seconds from the first request to the last token."""

    seconds: float
    answers: list[Answer]


def run_load(server: Server, options: Options, point: Point, number: int, tick: Callable[[], None]) -> Load:
    """Ask all of a point's questions, those about a clip one after the other in the queue.

    Args:
        server: What is asked.
        options: Of the requests.
        point: How.
        number: Of the point in the run: its clips are others than those of other points.
        tick: Called once for each answer.

    Raises:
        UserError: The server refuses a request, or is gone.
    """
    return asyncio.run(_run(server, options, point, number, tick))


async def _run(server: Server, options: Options, point: Point, number: int, tick: Callable[[], None]) -> Load:
    import openai

    # What a request raises the group raises; what is left to tell is Ctrl-C, which the command does.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    clips = [
        clip(options.seconds, options.seed + 100_000 * number + i) for i in range(options.requests // point.questions)
    ]
    queue = iter([(sound, i) for sound in clips for i in range(point.questions)])
    answers: list[Answer] = []
    async with openai.AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0, timeout=TIMEOUT) as client:

        async def work() -> None:
            for sound, i in queue:
                asked = messages(sound, i, options.characters)
                answers.append(await _ask(client, server.model, asked, options.new_tokens))
                tick()

        start = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(point.concurrency):
                    group.create_task(work())
        except ExceptionGroup as group_of_errors:
            error = group_of_errors.exceptions[0]
            if isinstance(error, openai.OpenAIError):
                raise UserError(f"the server refused: {one_line(error)}") from error
            raise error from None
        return Load(time.perf_counter() - start, answers)


async def _ask(client: Any, model: str, asked: list[dict[str, Any]], new_tokens: int) -> Answer:
    answer = Answer()
    before = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=asked,
        max_completion_tokens=new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for piece in stream:
        if piece.usage is not None:
            answer.prompt_tokens = piece.usage.prompt_tokens
        count = len(getattr(piece.choices[0], "token_ids", None) or ()) if piece.choices else 0
        if not count:
            continue
        now = time.perf_counter()
        if answer.tokens:
            answer.gaps += [(now - before) / count] * count
        else:
            answer.first_token_seconds = now - before
        answer.tokens, before = answer.tokens + count, now
    if answer.tokens != new_tokens:
        raise UserError(f"the server must answer with {new_tokens} tokens, got {answer.tokens}")
    return answer


def messages(sound: str, number: int, length: int) -> list[dict[str, Any]]:
    """Return a request's messages: the clip, then a question of so many characters that differs from other numbers'."""
    question = f"{number} What is to be heard here, and how long does it last? " * (1 + length // 50)
    part = {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
    return [{"role": "user", "content": [part, {"type": "text", "text": question[:length]}]}]


def clip(seconds: float, seed: int) -> str:
    """Return a WAV file of noise under a slow tone, in base64."""
    time_axis = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(time_axis))
    samples = 8_000 * np.sin(2 * np.pi * (200 + seed % 97) * time_axis) + 2_000 * noise
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        writer.writeframes(samples.astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()
