"""The OpenAI server: chats with sounds, turns and streams; wrong requests are answered and the server lives on; killed
and started again it answers as before."""

import base64
import io
import os
import signal
import urllib.error
import urllib.request

import openai
import pytest
import soundfile
import torch
from support.chats import WRONG, address, ask, audio, given, text, user, wav
from support.served import WIDTH, sound
from support.servers import server

CLIPS = {"short": sound(0.7), "windows": sound(4.6, 2)}


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)


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


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_answered_400_and_the_server_lives_on(client, name):
    messages, message = WRONG[name]
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, messages)
    assert len(ask(client, CHATS["no audio"]).choices) == 1


def test_what_is_no_json_is_a_400_too(running):
    request = urllib.request.Request(
        f"{running.url}/chat/completions", data=b"{", headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


def test_clips_by_address(client, running, site):
    """A file that the server may read, and a URL whose host it may ask, are heard as a clip that is sent."""
    (running.files / "a clip.wav").write_bytes(wav(CLIPS["windows"]))
    sent, *others = (
        ask(client, [user(part, text("What is it?"))]).choices[0].token_ids
        for part in (
            audio(wav(CLIPS["windows"])),
            address(f"file://{running.files}/a%20clip.wav"),
            address(f"{site}/a%20clip.wav"),
        )
    )
    assert others == [sent, sent]


def test_log_probabilities_of_a_prompt_whose_clip_takes_several_steps(client):
    """Not a number would be no JSON."""
    messages = [user(text("Listen: "), audio(wav(sound(25, 7))), text("What is it?"))]
    answer = ask(client, messages, extra_body={"prompt_logprobs": 1})
    assert answer.usage.prompt_tokens > 256  # of a step
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens


WRONG_ADDRESSES = {
    "outside": ("file://{log}", openai.BadRequestError, "must be a subpath of `--allowed-local-media-path"),
    "above": ("file://{files}/../log", openai.BadRequestError, "must be a subpath of `--allowed-local-media-path"),
    "no file": ("file://{files}/none.wav", openai.InternalServerError, "No such file"),
    "no server": ("http://127.0.0.1:1/a.wav", openai.InternalServerError, "Cannot connect"),
    "another host": ("http://localhost:1/a.wav", openai.BadRequestError, "must be from one of the allowed domains"),
    "not there": ("{site}/none.wav", openai.UnprocessableEntityError, "HTTP 404"),
    "no clip": ("{site}/", openai.BadRequestError, "Invalid or (corrupted|unsupported) audio"),
    "another scheme": ("ftp://127.0.0.1/a.wav", openai.BadRequestError, "must be either a HTTP, data or file URL"),
}


@pytest.mark.parametrize("name", WRONG_ADDRESSES)
def test_wrong_addresses_are_refused_and_the_server_lives_on(client, running, site, name):
    pattern, error, message = WRONG_ADDRESSES[name]
    with pytest.raises(error, match=message):
        ask(client, [user(address(pattern.format(log=running.log, files=running.files, site=site)), text("?"))])
    again = client.with_options(max_retries=2)  # with a 500 the connection ends
    assert len(ask(again, CHATS["no audio"]).choices) == 1


def test_killed_and_started_again_it_answers_as_before(running, client, directory):
    before = ask(client, CHATS["turns"]).choices[0].message.content
    os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
    with pytest.raises(openai.APIConnectionError):
        ask(client, CHATS["turns"])
    with server(directory("lal"), running.port, running.log):
        assert ask(client, CHATS["turns"]).choices[0].message.content == before
        message = "Cannot load local files without `--allowed-local-media-path`"  # as this one was started
        with pytest.raises(openai.InternalServerError, match=message):
            ask(client, [user(address(f"file://{running.log}"), text("?"))])
        again = client.with_options(max_retries=2)
        assert ask(again, CHATS["turns"]).choices[0].message.content == before
