"""A server under load, 16 requests at a time: every answer is what it is alone, and nothing stays behind."""

import asyncio
import collections
import json
import time

import openai
import pytest
import torch
from support.chats import WRONG, address, ask, audio, figures, given, request_of, text, user, wav
from support.kept import held_by, kept_by_worker
from support.served import WIDTH, sound

REQUESTS, AT_ONCE, SEEDS = 500, 16, 5
LONGEST = 40  # tokens of an answer
KEPT = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@pytest.fixture(scope="module")
def good(running, site):
    """Messages by kind and seed. Some share a clip, or the start of a conversation."""
    made = {}
    for seed in range(SEEDS):
        clip, other = wav(sound(0.4 + 0.5 * seed, seed)), wav(sound(1.9, 10 + seed))
        (running.files / f"{seed}.wav").write_bytes(clip)
        states = torch.randn(3 + 20 * seed, WIDTH, generator=torch.Generator().manual_seed(seed))
        asked = user(audio(clip), text(f"What is it, {seed}?"))
        made |= {
            ("text", seed): [user(text(f"Hello {seed}! And now for something completely different."))],
            ("clip", seed): [asked],
            ("clip again", seed): [user(audio(clip), text("Who speaks?"))],
            ("several clips", seed): [user(text("First "), audio(clip), text(" then "), audio(other), text("?"))],
            ("turns", seed): [asked, {"role": "assistant", "content": "A tone."}, user(text("And "), audio(other))],
            ("windows", seed): [user(text("Listen: " * 20), audio(wav(sound(9 + seed, seed))), text("How long?"))],
            ("states", seed): [user(text("So: "), given(states), text("?"))],
            ("file", seed): [user(address(f"file://{running.files}/{seed}.wav"), text(f"Again, {seed}?"))],
            ("URL", seed): [user(address(f"{site}/{seed}.wav"), text(f"What else, {seed}?"))],
        }
    return made


async def give_up(port, number):
    """Leave an answer after its first piece, or before it, or the request when half of it is sent."""
    messages = [user(audio(wav(sound(3, 100 + number))), text("?"))]
    request = {"model": "pal", "messages": messages, "max_tokens": 800, "ignore_eos": True, "stream": True}
    body = json.dumps(request).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    after = ("the first piece", "the request", "half of it")[number % 3]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    writer.write(body[: len(body) // 2] if after == "half of it" else body)
    await writer.drain()
    if after == "the first piece":
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"data: ")
    writer.close()
    await writer.wait_closed()


def what_is_sent(good, number):
    """A key of the good messages, or what a wrong one is, or "given up"."""
    if number % 20 == 3:
        return list(WRONG)[number // 20 % len(WRONG)]
    return "given up" if number % 20 == 13 else list(good)[number % len(good)]


async def load(running, good, alone, numbers):
    """Send requests, and return how many there were of each kind."""
    client = openai.AsyncOpenAI(base_url=running.url, api_key="none", max_retries=0)
    kinds, places = collections.Counter(), asyncio.Semaphore(AT_ONCE)

    async def one(number):
        key, new, stream = what_is_sent(good, number), 4 + number % (LONGEST - 3), number % 2 == 0
        async with places:
            if key in WRONG:
                messages, message = WRONG[key]
                with pytest.raises(openai.BadRequestError, match=message):
                    await client.chat.completions.create(**request_of(messages))
                kinds["wrong"] += 1
            elif key == "given up":
                await give_up(running.port, number // 20)
                kinds["given up"] += 1
            else:
                answer = await client.chat.completions.create(**request_of(good[key], max_tokens=new, stream=stream))
                choices = [choice async for piece in answer for choice in piece.choices] if stream else answer.choices
                tokens = [token for choice in choices for token in getattr(choice, "token_ids", None) or ()]
                assert tokens == alone[key][:new], (number, key)
                kinds["good"] += 1

    async with client:
        await asyncio.gather(*map(one, numbers))
    return kinds


def wait_until_idle(port):
    """Wait until the server has noticed who is gone: a step or two later."""
    for _ in range(60):
        left = {name: figures(port)[name] for name in KEPT}
        if not any(left.values()):
            return
        time.sleep(1)
    raise AssertionError(f"nothing may be left of requests that ended, got {left}")


def test_a_load_of_all_kinds(running, good):
    """A tenth is wrong or given up. After 200 requests all clips were heard, and all caches are full."""
    with openai.OpenAI(base_url=running.url, api_key="none", max_retries=0) as client:
        alone = {key: ask(client, messages, max_tokens=LONGEST).choices[0].token_ids for key, messages in good.items()}
    kinds, held = collections.Counter(), []
    for numbers in (range(200), range(200, REQUESTS)):
        kinds += asyncio.run(load(running, good, alone, numbers))
        wait_until_idle(running.port)
        held.append(held_by(running.process.pid))
    assert kinds == {"good": REQUESTS * 9 // 10, "wrong": REQUESTS // 20, "given up": REQUESTS // 20}
    kept = kept_by_worker(running.port)
    assert kept["requests"] == 0
    assert kept["tokens"] <= 1023  # of the encoder cache, which holds the longest clip that fits
    before, after = held
    assert after.files <= before.files
    # A clip's samples are three quarters of what is sent, its features half of these: a server that kept either of them
    # would grow by more than a third.
    sent = sum(len(json.dumps(good.get(what_is_sent(good, number), ""))) for number in range(200, REQUESTS))
    assert after.memory - before.memory < sent / 3, (before, after)
