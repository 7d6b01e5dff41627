"""`evaluate`, end to end on models with random weights."""

import dataclasses
import json

import pytest
import torch
from support.asked import WORDS, clip, processor_with_ends, sample, several
from support.audio_llm import AUDIO_TOKEN, INTEGRATIONS, build_pal, entry, open_gates

from palkernels.model import evaluate
from palkernels.model.data import Sample

NEW = 6


@pytest.fixture(scope="module")
def parts():
    model = build_pal(entry("sslam"), dtype=torch.float64)
    return model, processor_with_ends(model)


def alone(model, processor, one: Sample) -> str:
    """What a model answers to a sample by itself."""
    inputs = processor.apply_chat_template(list(one.messages[:-1]), add_generation_prompt=True, tokenize=True)
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_answers_are_those_of_each_sample_alone_whatever_the_batch(name: str) -> None:
    entries, settings = INTEGRATIONS[name]
    model = open_gates(build_pal(*entries, dtype=torch.float64, **settings))
    processor = processor_with_ends(model)
    samples = several()
    expected = [alone(model, processor, one) for one in samples]
    assert len(set(expected)) > 1
    by_rule = {"transcribe": ["exact"]}
    found = [
        evaluate(model, processor, samples, batch_size=size, max_new_tokens=NEW, metrics=metrics).answers
        for size, metrics in ((1, by_rule), (3, by_rule), (3, ["exact"]))
    ]
    for answers in found:
        assert [answer.answer for answer in answers] == expected
        assert [answer.source for answer in answers] == [one.source for one in samples]
    for one, other in zip(*found[:2], strict=True):
        assert one.chosen == other.chosen
        torch.testing.assert_close(dict(one.likelihoods), dict(other.likelihoods), rtol=1e-9, atol=1e-9)
    assert [bool(answer.likelihoods) for answer in found[0]] == [bool(one.choices) for one in samples]
    assert not any(answer.likelihoods for answer in found[2])  # nobody asked for them


def test_figures_by_task_and_of_all(parts) -> None:
    model, processor = parts
    right = alone(model, processor, sample("What is this?"))
    samples = [
        sample("What is this?", f" {right.upper()} ", number=0, task="names"),
        sample("What is this?", "something else", number=1, task="names"),
        sample("What is this?", right, number=2, task="things"),
        *(sample("Which?", word, number=3 + i, task="words", choices=WORDS) for i, word in enumerate(WORDS)),
    ]
    scores = evaluate(model, processor, samples, batch_size=2, max_new_tokens=NEW)
    names, things, words = scores.tasks
    assert [of_task.task for of_task in scores.tasks] == ["names", "things", "words"]
    assert (names.count, names.scores[0].metric, names.scores[0].value) == (2, "exact", 0.5)
    assert (things.count, things.scores[0].value) == (1, 1.0)
    assert [(score.metric, score.value) for score in words.scores] == [("choice", 0.25), ("exact", 0.0)]
    assert scores.overall.task is None
    overall = {score.metric: score for score in scores.overall.scores}
    assert (overall["choice"].count, overall["choice"].value) == (4, 0.25)
    assert (overall["exact"].count, overall["exact"].value) == (7, pytest.approx(2 / 7))
    assert [answer.correct for answer in scores.answers] == [True, False, True, *[False] * 4]
    document = json.loads(json.dumps(scores.document(), allow_nan=False))
    assert document["tasks"]["names"]["metrics"]["exact"] == {
        "value": 0.5, "interval_95": pytest.approx([0.0945312, 0.9054688]), "samples": 2
    }  # fmt: skip
    assert document["overall"]["samples"] == 7
    assert document["settings"] == {
        "batch_size": 2,
        "max_new_tokens": NEW,
        "metrics": {"names": ["exact"], "things": ["exact"], "words": ["choice", "exact"]},
        "dtype": "float64",
        "device": "cpu",
    }
    assert set(document["versions"]) == {"palkernels", "torch", "transformers"}


def test_an_answer_ends_at_the_first_end(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it is neither said nor counted as cut off."""
    model, processor = parts
    one = sample("What is this?")
    inputs = processor.apply_chat_template(list(one.messages[:-1]), add_generation_prompt=True, tokenize=True)
    tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    last = next(i for i in range(1, NEW) if tokens[i] not in tokens[:i])
    scores = evaluate(model, processor, [one], max_new_tokens=NEW)
    assert [answer.complete for answer in scores.answers] == [False]
    assert scores.document()["incomplete_answers"] == 1
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, tokens[last]])
    (ended,) = evaluate(model, processor, [one], max_new_tokens=NEW).answers
    assert ended.complete
    assert ended.answer == processor.tokenizer.decode(tokens[:last], skip_special_tokens=True).strip()


def test_what_cannot_be_asked_is_listed_and_in_no_figure(parts, tmp_path) -> None:
    model, processor = parts
    (tmp_path / "text.wav").write_text("no sound")
    samples = [
        sample(number=0, task="a"),
        sample(number=1, task="a", clips=[tmp_path / "missing.wav"]),
        sample(number=2, task="b", clips=[clip(), tmp_path / "text.wav"]),
        dataclasses.replace(sample(number=3, task="a"), messages=sample().messages[:1]),
        sample(f"a {AUDIO_TOKEN} in the text", number=4, task="a"),
        sample(number=5, task="a", answer="x", choices=("red", "blue")),
        sample("another", number=6, task="a"),
    ]
    told = []
    scores = evaluate(model, processor, samples, batch_size=4, max_new_tokens=2, progress=told.append)
    assert [answer.source for answer in scores.answers] == ["made:0", "made:6"]
    details = {dropped.source: dropped.detail for dropped in scores.dropped}
    assert list(details) == ["made:1", "made:2", "made:3", "made:4", "made:5"]
    refused = "refused by the processor"
    reasons = [dropped.reason for dropped in scores.dropped]
    unreadable = "audio unreadable"  # as data that is trained on has it
    assert reasons == [unreadable, unreadable, "no answer", refused, "answer not among the choices"]
    for number, detail in (
        (1, "missing.wav' must exist"), (2, "text.wav' must hold"), (3, "messages must end"), (4, "content must be"),
        (5, "the answer must be one of the choices 'red', 'blue', got 'x'"),
    ):  # fmt: skip
        assert detail in details[f"made:{number}"]
    assert [(of_task.task, of_task.count) for of_task in scores.tasks] == [("a", 2)]
    assert scores.overall.count == 2
    assert told == sorted(told)
    assert told[-1] == len(samples)
    assert len(scores.document()["dropped"]) == 5


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ([], {}, "samples must hold at least one, got none"),
        ([sample(answer="")], {}, "must hold one that can be asked, got none of 1: the answer to compare with must be"),
        ([sample(clips=["/none.wav"])] * 2, {}, "got none of 2: audio file '/none.wav' must exist"),
        ([sample()], {"metrics": ["f1"]}, r"metrics must be some of .*, got \['f1'\]"),
        ([sample()], {"metrics": {"x": ["exact"]}}, "metrics must be given for a task of the samples, '', got 'x'"),
        ([sample()], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([sample()], {"max_new_tokens": 1.5}, "max_new_tokens must be at least 1, got 1.5"),
    ],
)
def test_mistakes(parts, samples, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(*parts, samples, **settings)


def test_the_model_is_left_as_it_was(parts) -> None:
    model, processor = parts
    model.train()
    try:
        evaluate(model, processor, [sample()], max_new_tokens=1)
        assert model.training
        with pytest.raises(ValueError, match="got none of 1"):
            evaluate(model, processor, [sample(clips=["/none.wav"])], max_new_tokens=1)
        assert model.training
    finally:
        model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_clip_is_encoded_once(parts) -> None:
    """For generation and choices both, and once where several samples of a batch share a file's object."""
    model, processor = parts
    seen = []
    hook = model.audio_tower[0].register_forward_hook(lambda module, given, states: seen.append(states.shape[0]))
    shared = clip()
    samples = [sample("a?", clips=[shared], choices=WORDS), sample("bc?", clips=[shared, clip(300)], choices=WORDS)]
    evaluate(model, processor, samples, max_new_tokens=3)
    hook.remove()
    assert seen == [2]


@pytest.mark.parametrize("name", ["plits+lal", "lfst"])
def test_states_take_the_place_of_encoders(name: str) -> None:
    """Of one encoder and two: the same answers, and no encoder runs."""
    entries, settings = INTEGRATIONS[name]
    model = build_pal(*entries, dtype=torch.float64, **settings)
    processor = processor_with_ends(model)
    whole = evaluate(model, processor, several(), batch_size=3, max_new_tokens=NEW, metrics=["exact"])

    class States:
        checked = None

        def check(self, processor) -> None:
            self.checked = processor

        @torch.no_grad()
        def of_clips(self, clips, sampling_rate=None):
            features, lengths = processor.audio_features(clips, sampling_rate)
            return [forward(of_tower) for forward, of_tower in zip(forwards, features, strict=True)], lengths

    def refuse(*arguments) -> None:
        raise AssertionError("no encoder must run")

    states, forwards = States(), [tower.forward for tower in model.audio_tower]
    for tower in model.audio_tower:
        tower.forward = refuse
    kept = evaluate(model, processor, several(), batch_size=2, max_new_tokens=NEW, metrics=["exact"], states=states)
    assert states.checked is processor
    assert [answer.answer for answer in kept.answers] == [answer.answer for answer in whole.answers]
    with pytest.raises(AssertionError, match="no encoder must run"):
        evaluate(model, processor, several(), max_new_tokens=NEW, metrics=["exact"])
