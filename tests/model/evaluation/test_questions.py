"""Samples as questions, and in batches."""

from pathlib import Path

import pytest
from support.asked import sample, several

from palkernels.model.data import Sample
from palkernels.model.evaluation.questions import batches, question_of, why_not

USER = {"role": "user", "content": "what?"}


def test_a_question_is_all_but_the_last_answer() -> None:
    first, last = (
        {"role": "assistant", "content": "a bell"},
        {"role": "assistant", "content": [{"type": "text", "text": " two "}]},
    )
    heard = {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "how many?"}]}
    question = question_of(7, Sample((USER, first, heard, last), "a.jsonl:1"))
    assert (question.number, question.reference, question.text) == (7, "two", "<audio>how many?")
    assert question.messages == (USER, first, heard)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((), "must end with the assistant's answer to a question, got none"),
        ((USER,), "got user"),
        (({"role": "assistant", "content": "red"},), "got assistant"),
        ((USER, {"role": "assistant", "content": "red"}, USER), "got user, assistant, user"),
        ((USER, {"role": "assistant", "content": " "}), "the answer to compare with must be a text, got none"),
        ((USER, {"role": "assistant", "content": None}), "the answer to compare with must be a text, got none"),
        ((USER, {"role": "assistant"}), "the answer to compare with must be a text, got none"),
    ],
)
def test_what_cannot_be_asked(messages: tuple, reason: str) -> None:
    counted, detail = why_not(Sample(messages, "a:1")) or ("", "")
    assert counted == "no answer"
    assert detail.endswith(reason)


def test_an_answer_is_one_of_the_choices() -> None:
    assert why_not(sample(answer="Red.", choices=("red", "blue"))) is None
    assert why_not(sample(answer="green", choices=("red", "blue"))) == (
        "answer not among the choices",
        "the answer must be one of the choices 'red', 'blue', got 'green'",
    )


def test_batches_are_of_one_kind_and_of_like_length(tmp_path: Path) -> None:
    for name, size in (("long", 300), ("short", 10), ("middle", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    names = ("short", "long", "none", "middle")
    of_files = [sample("what?", clips=[tmp_path / name], number=i) for i, name in enumerate(names)]
    texts = [sample("x" * length, clips=[], number=i) for i, length in enumerate((3, 9, 5))]
    samples = [*of_files, *texts, *several()]
    questions = [question_of(number, each) for number, each in enumerate(samples)]
    found = batches(questions, 2)
    assert sorted(question.number for batch in found for question in batch) == list(range(len(samples)))
    assert all(len(batch) <= 2 for batch in found)
    assert all(len({bool(question.sample.choices) for question in batch}) == 1 for batch in found)
    order = [question.number for batch in found for question in batch]
    assert [number for number in order if number < 4] == [1, 3, 0, 2]  # by the files' sizes
    assert [number for number in order if 4 <= number < 7] == [5, 6, 4]  # by the texts
