"""Requests to an OpenAI server: what messages hold, and what is refused."""

import base64
import io
import urllib.request
from typing import Any

import numpy as np
import openai
import soundfile
import torch

from support.served import NEW, RATE, WIDTH, sound


def wav(clip: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> bytes:
    """The file of a clip, its samples as they are."""
    file = io.BytesIO()
    soundfile.write(file, clip, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def audio(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def address(url: str) -> dict[str, Any]:
    """The part of a message that says where a clip is."""
    return {"type": "audio_url", "audio_url": {"url": url}}


def given(states: torch.Tensor) -> dict[str, Any]:
    """The part of a message that holds states instead of a clip."""
    file = io.BytesIO()
    torch.save(states, file)
    return {"type": "audio_embeds", "audio_embeds": base64.b64encode(file.getvalue()).decode()}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*content: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def request_of(messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What the client takes: an answer of as many tokens as were asked for, always the same."""
    settings = {"max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    return {"model": "pal", "messages": messages, **settings, **options}


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    return client.chat.completions.create(**request_of(messages, **options))


def figures(port: int) -> dict[str, float]:
    """A server's figures by name, each summed over its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    totals: dict[str, float] = {}
    for line in lines:
        if line.startswith("vllm:"):
            name = line.removeprefix("vllm:").partition("{")[0]
            totals[name] = totals.get(name, 0.0) + float(line.rpartition(" ")[2])
    return totals


SHORT = sound(0.7)
# By name: the messages, and what the answer, a 400, says.
WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "too many": ([user(*[audio(wav(SHORT))] * 3, text("?"))], "At most 2 audio"),
    "no file": ([user(audio(b"RIFF, but no sound"), text("?"))], "Invalid or (corrupted|unsupported) audio"),
    "not base64": (
        [user({"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}, text("?"))],
        "base64",
    ),
    "too long": ([user(audio(wav(np.zeros(120_000), 1_000, "PCM_U8")), text("?"))], "at most 1023 tokens"),
    "longer than vLLM decodes": (
        [user(audio(wav(np.zeros(601_000), 1_000, "PCM_U8")), text("?"))],
        "VLLM_MAX_AUDIO_DECODE_DURATION_S",
    ),
    "not finite": ([user(audio(wav(np.full(800, np.nan, np.float32))), text("?"))], "finite samples"),
    "an audio token in a text": ([user(audio(wav(SHORT)), text("<|AUDIO|>?"))], r"must not hold <\|AUDIO\|>"),
    "an audio token and no clip": ([user(text("<|AUDIO|>?"))], r"must not hold <\|AUDIO\|>"),
    "an audio token in an answer": (
        [user(text("?")), {"role": "assistant", "content": "<|AUDIO|>"}, user(text("?"))],
        r"must not hold <\|AUDIO\|>",
    ),
    "states that overflow": ([user(given(torch.full((20, WIDTH), 3e38)), text("?"))], "within 10,000 of 0"),
    "another rate": ([user(audio(wav(SHORT, 900)), text("?"))], "sampling rate of 1000 to"),
}
