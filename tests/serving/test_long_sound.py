"""An hour of sound, by LAL: every window of it is heard, and questions are answered as by Hugging Face."""

import numpy as np
import pytest
import torch
from support.served import AUDIO_ID, RATE, A, Question, ask, assert_same, engine, prompt_of, sound

from palkernels.model.pal.conversation import CLIPS

SECONDS, TOKENS = 3_600, 45_000  # 50 states a second, of four together
TEXTS = (f"user: {A}What was it?\nassistant: ", f"user: {A}And at the end?\nassistant: ")


@pytest.fixture(scope="module")
def hour():
    return np.concatenate([sound(60, minute) for minute in range(SECONDS // 60)])


def metric(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_an_hour_is_answered_as_by_hugging_face(directory, reference, hour):
    """Encoded in windows, given to the layers in steps, and found by the second question in the cache."""
    hugging_face = reference("lal")
    inputs = hugging_face.processor(TEXTS[0], [hour], RATE)
    with torch.no_grad():
        heard = hugging_face.model.get_audio_features(*(inputs[name] for name in CLIPS))
    answers = []
    for text in TEXTS:
        asked = {**hugging_face.processor(text, [hour[:RATE]], RATE), "audio_features": heard}
        answers.append(hugging_face.answer_inputs({name: asked[name] for name in asked if name not in CLIPS}))
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
