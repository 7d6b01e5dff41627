"""The probabilities of choices, from a cache that goes on, against whole forwards without one."""

import copy

import pytest
import torch
from support.asked import TEMPLATE, WORDS, clip, processor_with_ends, sample
from support.audio_llm import INTEGRATIONS, TOKENIZER, build_pal, entry, open_gates
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from palkernels.model import AUDIO_TOKEN, PalProcessor
from palkernels.model.evaluation.answering import Asker
from palkernels.model.evaluation.choosing import choice_tokens
from palkernels.model.evaluation.questions import Question, question_of

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@torch.no_grad()
def by_whole_forwards(model, processor, question: Question) -> list[float]:
    """The log-probability of each choice's labels up to the end of the answer, by a forward of its own."""
    found = []
    for choice in question.sample.choices:
        conversation = [*question.messages, {"role": "assistant", "content": choice}]
        batch = processor.apply_chat_template(conversation, tokenize=True, output_labels=True)
        labels = batch.pop("labels")[0, 1:]
        end = processor.tokenizer.eos_token_id
        chances = model(**batch, use_cache=False).logits[0, :-1].log_softmax(-1)
        labelled = [(i, token) for i, token in enumerate(labels.tolist()) if token != -100]
        upto = [token for _, token in labelled].index(end) + 1
        found.append(sum(chances[i, token].item() for i, token in labelled[:upto]))
    return found


def asked(model, processor, questions: list[Question]) -> list[list[float]]:
    answers, dropped = Asker(model, processor, 1, choices=True).ask(questions)
    assert not dropped
    return [list(answers[question.number].likelihoods.values()) for question in questions]


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_against_whole_forwards(name: str) -> None:
    """Of questions with one clip, two and none, in one batch with padding; of choices with and without tokens alike."""
    entries, settings = INTEGRATIONS[name]
    model = open_gates(build_pal(*entries, dtype=torch.float64, **settings))
    processor = processor_with_ends(model)
    clips = [[clip()], [clip(300, 0.04), clip()], []]
    questions = [
        question_of(i, sample("which? " * (i + 1), "red", of_one, choices=WORDS[: i + 2]))
        for i, of_one in enumerate(clips)
    ]
    together = asked(model, processor, questions)
    for question, found in zip(questions, together, strict=True):
        torch.testing.assert_close(found, by_whole_forwards(model, processor, question), **CLOSE)
        torch.testing.assert_close(asked(model, processor, [question])[0], found, **CLOSE)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_other_families(family: str) -> None:
    model = build_pal(entry("sslam"), family=family, dtype=torch.float64)
    processor = processor_with_ends(model)
    questions = [question_of(i, sample("which?" * i, "red", choices=WORDS)) for i in range(1, 3)]
    for question, found in zip(questions, asked(model, processor, questions), strict=True):
        torch.testing.assert_close(found, by_whole_forwards(model, processor, question), rtol=1e-5, atol=1e-5)


def test_a_choice_is_the_whole_answer() -> None:
    """Its tokens are those of an answer with the first token that ends it; what a template writes behind is not."""
    processor = processor_with_ends(build_pal(entry("sslam")))
    question = question_of(0, sample(choices=("red", "re")))
    tokens, surplus = choice_tokens(processor, question, frozenset([TOKENIZER.eos_token_id]))
    assert [processor.tokenizer.decode(ids) for ids in tokens] == ["red<|end|>", "re<|end|>"]
    assert surplus == 0
    without_end, _ = choice_tokens(processor, question, frozenset())
    assert [processor.tokenizer.decode(ids) for ids in without_end] == ["red<|end|>\n", "re<|end|>\n"]


def test_tokens_that_join_question_and_answer() -> None:
    """Where the last token of a question becomes one with the answer's first, the question ends before it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|pad|>", "<|end|>", AUDIO_TOKEN]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, "Ġr"])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "r")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    text = {"vocab_size": len(tokenizer)}
    model = build_pal(entry("sslam", "plits"), entry("sslam"), dtype=torch.float64, text=text)
    processor = PalProcessor.from_config(tokenizer, model.config, chat_template=TEMPLATE)
    questions = [
        question_of(0, sample("which?", "red", choices=("red", "blue"))),
        question_of(1, sample("which one?", "blue", choices=("blue", "green"))),
        question_of(2, sample("?", "red", choices=("red", "re"))),
    ]
    ends = frozenset([tokenizer.eos_token_id])
    pieces = [choice_tokens(processor, question, ends) for question in questions]
    assert [surplus for _, surplus in pieces] == [1, 0, 1]
    assert [tokenizer.decode(ids) for ids in pieces[0][0]] == [" red<|end|>", " blue<|end|>"]
    for question, found in zip(questions, asked(model, processor, questions), strict=True):
        expected = by_whole_forwards(model, processor, question)
        if question.number != 0:
            torch.testing.assert_close(found, expected, **CLOSE)
        else:  # a blank before "blue" is the question's, and counts here as it does for "red"
            torch.testing.assert_close(found[0], expected[0], **CLOSE)
            assert found[1] < expected[1]


def test_a_template_that_hides_clips_of_answered_questions() -> None:
    model = build_pal(entry("sslam"))
    processor = processor_with_ends(model)
    other = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    processor.chat_template = f"{{% if add_generation_prompt %}}{other}{{% else %}}answered {other}{{% endif %}}"
    question = question_of(0, sample(choices=("red", "re")))
    with pytest.raises(ValueError, match="chat_template must render a question's clips alike before and after"):
        choice_tokens(processor, question, frozenset())


def test_the_choices_of_a_cache_leave_it_as_it_was() -> None:
    """More choices than questions go on from the cache in turns."""
    model = build_pal(entry("sslam"), dtype=torch.float64)
    processor = processor_with_ends(model)
    many = tuple(f"number {i}" for i in range(7))
    question = question_of(0, sample(answer="number 1", choices=many))
    one_by_one = [
        asked(model, processor, [question_of(0, sample(answer=choice, choices=(choice,)))])[0][0] for choice in many
    ]
    torch.testing.assert_close(asked(model, processor, [copy.copy(question)])[0], one_by_one, **CLOSE)
