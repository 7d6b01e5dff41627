"""vLLM answers as Hugging Face with ``attach`` does, token by token: every way for audio to enter, clips of several
lengths batched with texts alone, windows, each of them a second time, and a clip's states in its place."""

import pytest
import torch
from support.served import MODELS, QUESTIONS, RATE, ask, assert_same, engine, prompt_of

CASES = [(name, "llama") for name in MODELS] + [("lal", "qwen2"), ("lal", "qwen3")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, directory, reference):
    """A model's engine, and the model and its answers by Hugging Face."""
    hugging_face = reference(*request.param)
    answers = {key: hugging_face.answer(question) for key, question in QUESTIONS.items()}
    with engine(directory(*request.param), enable_mm_embeds=True) as llm:
        yield llm, hugging_face, answers


def test_answers_are_those_of_hugging_face(case):
    llm, _, answers = case
    outputs = ask(llm, [prompt_of(question) for question in QUESTIONS.values()])
    for key, output in zip(QUESTIONS, outputs, strict=True):
        assert_same(output, answers[key])


def test_a_question_alone_and_again(case):
    """Alone, so that its rows are the step's only ones; again, so that what is cached is used."""
    llm, _, answers = case
    for key in ("two", "two", "windows", "text"):
        (output,) = ask(llm, [prompt_of(QUESTIONS[key])])
        assert_same(output, answers[key])


def test_states_in_the_place_of_clips(case):
    """What a caller gives is what the connector makes of a clip; a unified model adds its summary."""
    llm, hugging_face, answers = case
    question = QUESTIONS["two"]
    inputs = hugging_face.processor(question.text, list(question.clips), RATE)
    with torch.no_grad():
        features = hugging_face.model.get_audio_features(inputs["input_features"], inputs["audio_lengths"])
    part = features.plits if features.lal is None else features.lal
    given = [states[:length] for states, length in zip(part.states, part.lengths.tolist(), strict=True)]
    prompt = {"prompt": question.text, "multi_modal_data": {"audio": given}}
    if len(hugging_face.model.config.encoders) > 1:
        with pytest.raises(Exception, match="audio_embeds must go to a model whose audio enters in one way"):
            ask(llm, [prompt])
    else:
        assert_same(*ask(llm, [prompt]), answers["two"])
