"""The OpenAI server: chats with sounds, turns and streams; wrong requests are answered and the server lives on; killed
and started again it answers as before."""

import asyncio
import base64
import io
import os
import signal
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
import soundfile
import torch
from support.served import NEW, RATE, WIDTH, sound
from support.servers import free_port, server

CLIPS = {"short": sound(0.7), "windows": sound(4.6, 2)}


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture(scope="module")
def running(directory, port, tmp_path_factory):
    """The server, which one test replaces: a list of its process."""
    log = tmp_path_factory.mktemp("server") / "log"
    with server(directory("lal"), port, log, "--enable-mm-embeds") as process:
        yield [process, log]


@pytest.fixture
def client(running, port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def wav(clip, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, clip, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def audio(data):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def text(content):
    return {"type": "text", "text": content}


def user(*content):
    return {"role": "user", "content": list(content)}


CHATS = {
    "audio first": [user(audio(wav(CLIPS["short"])), text("What is it?"))],
    "inside": [user(text("Listen: "), audio(wav(CLIPS["windows"])), text(" What did you hear?"))],
    "turns": [
        user(audio(wav(CLIPS["short"])), text("What is it?")),
        {"role": "assistant", "content": "A tone."},
        user(text("And this? "), audio(wav(CLIPS["windows"]))),
    ],
    "no audio": [{"role": "user", "content": "Hello!"}],
}


def by_hugging_face(reference, messages):
    """The answer of Hugging Face to a request's messages."""

    def part(one):
        if one["type"] == "text":
            return one
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(one["input_audio"]["data"])), dtype="float32")
        return {"type": "audio", "audio": {"array": samples, "sampling_rate": rate}}

    conversation = [
        {**message, "content": content if isinstance(content, str) else [part(one) for one in content]}
        for message in messages
        for content in [message["content"]]
    ]
    inputs = reference.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
    return reference.answer_inputs(inputs)


def ask(client, messages, **options):
    settings = {"max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    return client.chat.completions.create(model="pal", messages=messages, **{**settings, **options})


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_answered_as_by_hugging_face(client, reference, name):
    answer = ask(client, CHATS[name], logprobs=True, top_logprobs=5)
    expected = by_hugging_face(reference("lal"), CHATS[name])
    (choice,) = answer.choices
    assert choice.token_ids == expected.tokens
    for step, entry in enumerate(choice.logprobs.content):
        assert abs(entry.logprob - float(expected.logprobs[step].max())) < 1e-4


def test_a_stream_says_the_same(client):
    whole = ask(client, CHATS["inside"]).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in ask(client, CHATS["inside"], stream=True) if chunk.choices
    ]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1


def given(states):
    """The part of a message that holds states instead of a clip."""
    file = io.BytesIO()
    torch.save(states, file)
    return {"type": "audio_embeds", "audio_embeds": base64.b64encode(file.getvalue()).decode()}


def test_states_given_directly(client, reference):
    states = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(1))
    (choice,) = ask(client, [user(given(states), text("What is it?"))]).choices
    processor = reference("lal").processor
    asked = processor.apply_chat_template(
        [user({"type": "audio", "audio": "x"}, text("What is it?"))], add_generation_prompt=True
    )
    before, _, behind = asked.partition(processor.audio_token)
    ids = [processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, behind)]
    assert choice.token_ids == reference("lal").answer_states([ids[0], states, ids[1]]).tokens


WRONG = {
    "too many": ([user(*[audio(wav(CLIPS["short"]))] * 3, text("?"))], "At most 2 audio"),
    "no file": ([user(audio(b"RIFF, but no sound"), text("?"))], "Invalid or (corrupted|unsupported) audio"),
    "not base64": (
        [user({"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}, text("?"))],
        "base64",
    ),
    "too long": ([user(audio(wav(sound(120))), text("?"))], "at most 1023 tokens"),
    "longer than vLLM decodes": (
        [user(audio(wav(np.zeros(601_000, np.float32), 1_000)), text("?"))],
        "VLLM_MAX_AUDIO_DECODE_DURATION_S",
    ),
    "not finite": ([user(audio(wav(np.full(800, np.nan, np.float32))), text("?"))], "finite samples"),
    "an audio token in a text": ([user(audio(wav(CLIPS["short"])), text("<|AUDIO|>?"))], "once for each clip"),
    "states that overflow": ([user(given(torch.full((20, WIDTH), 3e38)), text("?"))], "within 10,000 of 0"),
    "another rate": ([user(audio(wav(CLIPS["short"], 900)), text("?"))], "sampling rate of 1000 to"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_answered_400_and_the_server_lives_on(client, name):
    messages, message = WRONG[name]
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, messages)
    assert len(ask(client, CHATS["no audio"]).choices) == 1


def test_what_is_no_json_is_a_400_too(running, port):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", data=b"{", headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


LOAD = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def test_many_at_once_are_answered_as_each_alone(running, client, port):
    """Good ones, wrong ones, and some that are given up midway, eight at a time."""
    alone = {name: ask(client, messages, max_tokens=40).choices[0].token_ids for name, messages in CHATS.items()}
    asynchronous = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    places = asyncio.Semaphore(8)

    async def one(number):
        """What became of a request: its kind, and its answer."""
        async with places:
            if number % 10 == 3:
                messages, message = list(WRONG.values())[number // 10 % len(WRONG)]
                with pytest.raises(openai.BadRequestError, match=message):
                    await ask(asynchronous, messages)
                return "wrong", None
            name = list(CHATS)[number % len(CHATS)]
            if number % 10 == 7:
                async for _ in await ask(asynchronous, CHATS[name], max_tokens=400, stream=True):
                    return "given up", None
            answer = await ask(asynchronous, CHATS[name], max_tokens=10 + number % 31)
            return name, answer.choices[0].token_ids

    async def all_of_them():
        return await asyncio.gather(*map(one, range(80)))

    kinds = {}
    for number, (kind, tokens) in enumerate(asyncio.run(all_of_them())):
        kinds[kind] = kinds.get(kind, 0) + 1
        assert tokens is None or tokens == alone[kind][: 10 + number % 31], number
    assert (kinds["wrong"], kinds["given up"]) == (8, 8)
    for _ in range(60):  # what was given up ends a step or two later
        left = {name: figure(port, name) for name in LOAD}
        if not any(left.values()):
            break
        time.sleep(1)
    assert not any(left.values()), left


def figure(port, name):
    """A figure of the server's."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    (value,) = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{")]
    return value


def test_killed_and_started_again_it_answers_as_before(running, client, directory, port):
    before = ask(client, CHATS["turns"]).choices[0].message.content
    process, log = running
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(openai.APIConnectionError):
        ask(client, CHATS["turns"])
    with server(directory("lal"), port, log):
        assert ask(client, CHATS["turns"]).choices[0].message.content == before
