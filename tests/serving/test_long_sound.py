"""An hour of sound, by LAL: every window of it is heard, and questions are answered as by Hugging Face."""

import numpy as np
import openai
import pytest
import soundfile
import torch
from support import chats
from support.served import AUDIO_ID, RATE, A, Question, ask, assert_same, engine, prompt_of, sound
from support.servers import free_port, server

from palkernels.model.pal.conversation import CLIPS

SECONDS, TOKENS = 3_600, 45_000  # 50 states a second, of four together
ASKED = ("What was it?", "And at the end?")
TEXTS = [f"user: {A}{asked}\nassistant: " for asked in ASKED]


@pytest.fixture(scope="module")
def hour():
    return np.concatenate([sound(60, minute) for minute in range(SECONDS // 60)])


def metric(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.fixture(scope="module")
def answers(reference, hour):
    """Of Hugging Face, which encodes the hour once."""
    hugging_face = reference("lal")
    inputs = hugging_face.processor(TEXTS[0], [hour], RATE)
    with torch.no_grad():
        heard = hugging_face.model.get_audio_features(*(inputs[name] for name in CLIPS))
    given = [{**hugging_face.processor(text, [hour[:RATE]], RATE), "audio_features": heard} for text in TEXTS]
    return [hugging_face.answer_inputs({name: asked[name] for name in asked if name not in CLIPS}) for asked in given]


def test_an_hour_is_answered_as_by_hugging_face(directory, answers, hour):
    """Encoded in windows, given to the layers in steps, and found by the second question in the cache."""
    with engine(directory("lal"), max_model_len=65_536, limit_mm_per_prompt={"audio": 1}) as llm:
        for text, answer in zip(TEXTS, answers, strict=True):
            (output,) = ask(llm, [prompt_of(Question(text, (hour,)))])
            assert output.prompt_token_ids.count(AUDIO_ID) == TOKENS
            assert_same(output, answer, closeness=5e-4)  # over so many keys stock text, too, differs by 1e-4
        assert metric(llm, "vllm:prefix_cache_hits") >= TOKENS - 32
        longer = Question(TEXTS[0], (np.zeros(4_001_000, np.float32),))
        with pytest.raises(Exception, match="at most 4000 s long, the processor's max_bytes"):
            ask(llm, [prompt_of(longer, 1_000)])
    limit = f"at most {TOKENS - 1} tokens, .* so that max_model_len {TOKENS} holds"
    small = engine(directory("lal"), max_model_len=TOKENS, limit_mm_per_prompt={"audio": 1})
    with small as llm, pytest.raises(Exception, match=limit):
        ask(llm, [prompt_of(Question(TEXTS[0], (hour,)))])


def test_an_hour_over_http(directory, answers, hour, tmp_path, monkeypatch):
    """From a file of the server's, with its limits raised."""
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", str(SECONDS))
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "300")
    soundfile.write(tmp_path / "hour.wav", hour, RATE, subtype="FLOAT")
    port, files = free_port(), str(tmp_path)
    options = "--max-model-len", "65536", "--allowed-local-media-path", files, "--enable-prompt-tokens-details"
    with server(directory("lal"), port, tmp_path / "log", *options):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for question, answer in zip(ASKED, answers, strict=True):
            clip = chats.address((tmp_path / "hour.wav").as_uri())
            got = chats.ask(client, [chats.user(clip, chats.text(question))])
            assert got.choices[0].token_ids == answer.tokens
        assert got.usage.prompt_tokens_details.cached_tokens >= TOKENS - 32
