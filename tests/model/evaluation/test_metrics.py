"""Metrics on hand-made answers, and which of them a task gets."""

import sys

import pytest
from support.asked import sample, several

from palkernels.model.data import Sample
from palkernels.model.evaluation.metrics import METRICS, chosen_metrics
from palkernels.model.evaluation.normalisation import normalised
from palkernels.model.evaluation.questions import question_of
from palkernels.model.evaluation.scores import Answer


def answer(reference: str, said: str, chosen: str | None = None) -> Answer:
    correct = normalised(said) == normalised(reference)
    return Answer("a:1", "t", "?", reference, said, correct, True, {}, chosen)


def questions(*samples: Sample) -> list:
    return [question_of(i, each) for i, each in enumerate(samples)]


def test_exact_match_and_choice() -> None:
    answers = [answer("red", "Red.", "red"), answer("red", "it is red", "Red"), answer("blue", "red", "red")]
    exact, choice = METRICS["exact"].score(answers), METRICS["choice"].score(answers)
    assert (exact.count, exact.value) == (3, pytest.approx(1 / 3))
    assert (choice.count, choice.value) == (3, pytest.approx(2 / 3))
    assert (exact.low, exact.high) == (pytest.approx(0.0614920), pytest.approx(0.7923404))  # Wilson's


def test_word_errors_are_of_all_words_together() -> None:
    pytest.importorskip("jiwer", reason="needs palkernels[evaluate]")
    answers = [
        answer("The cat sat.", "the cat sat"),  # 0 of 3
        answer("one two three four", "one too three four five"),  # 2 of 4
        answer("yes", ""),  # 1 of 1
    ]
    score = METRICS["wer"].score(answers)
    assert (score.count, score.value) == (3, pytest.approx(3 / 8))
    assert 0.0 <= score.low < score.value < score.high <= 1.0
    assert METRICS["cer"].score(answers[2:]).value == 1.0
    assert METRICS["cer"].score([answer("你好吗", "你好")]).value == pytest.approx(1 / 3)
    assert METRICS["wer"].score([answer("a", "b c d")]).value == 3.0  # more than all
    assert METRICS["wer"].score(answers[:1]).low is None
    with pytest.raises(ValueError, match=r"^the metric wer must be of references with words in them, got none$"):
        METRICS["wer"].score([answer("...", "a")])


def test_captions_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs palkernels[evaluate]")
    said = ["A dog barks loudly in the yard", "rain falls on a metal roof", "a man speaks"]
    references = ["a dog barks in a yard", "Rain is falling on a roof", "a woman sings a song"]
    answers = [answer(reference, one) for reference, one in zip(references, said, strict=True)]
    for name, metric in (("bleu", sacrebleu.BLEU(lowercase=True)), ("chrf", sacrebleu.CHRF(lowercase=True))):
        score = METRICS[name].score(answers)
        assert score.value == pytest.approx(metric.corpus_score(said, [references]).score)
        assert 0 <= score.low < score.high <= 100
        assert f"version:{sacrebleu.__version__}" in score.signature
        assert METRICS[name].score(answers) == score
        assert METRICS[name].score(answers[:1]).low is None
        assert METRICS[name].score([answer("a dog barks in a yard", "a dog barks in a yard")]).value == pytest.approx(
            100
        )


@pytest.mark.parametrize(
    ("task", "references", "expected"),
    [
        ("anything", ["red", "a big red bell"], ("exact",)),
        ("", ["one two three four five six", "red", "one"], ("exact",)),
        ("anything", ["one two three four five six", "a b c d e f g", "one"], ("bleu", "chrf")),
        ("Speech_transcription", ["red"], ("wer",)),
        ("ASR (English)", ["one two three four five six"], ("wer",)),
        ("audio caption", ["rain"], ("bleu", "chrf")),
        ("recaptioned laser", ["rain"], ("exact",)),
    ],
)
def test_the_rule(task: str, references: list[str], expected: tuple[str, ...]) -> None:
    for name in ("jiwer", "sacrebleu") if expected != ("exact",) else ():
        pytest.importorskip(name, reason="needs palkernels[evaluate]")
    asked = questions(*(sample(answer=reference, task=task) for reference in references))
    assert chosen_metrics(asked, None) == {task: expected}


def test_metrics_by_task() -> None:
    pytest.importorskip("jiwer", reason="needs palkernels[evaluate]")
    asked = questions(*several())
    by_rule = {"words": ("choice", "exact"), "transcribe": ("wer",), "names": ("exact",)}
    assert chosen_metrics(asked, None) == by_rule
    assert chosen_metrics(asked, {"transcribe": ["cer", "exact"]}) == by_rule | {"transcribe": ("cer", "exact")}
    assert chosen_metrics(asked, ["exact"]) == dict.fromkeys(by_rule, ("exact",))
    for wrong, message in (
        ({"transcribe": ["rouge"]}, "must be some of choice, exact, wer, cer, bleu, chrf, got ['rouge'] for the task"),
        (["wer", "x"], "got ['wer', 'x'] for the task 'words'"),
        ({"names": []}, "got [] for the task 'names'"),
        ({"names": "wer"}, "got 'wer' for the task 'names'"),
        ({"other": ["wer"]}, "must be given for a task of the samples, 'words', 'transcribe', 'names', got 'other'"),
        ({"names": ["choice"]}, "the metric choice must be of samples with choices, got made:3 without any"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            chosen_metrics(asked, wrong)
        assert message in str(caught.value)


@pytest.mark.parametrize(("metric", "package"), [("wer", "jiwer"), ("cer", "jiwer"), ("bleu", "sacrebleu")])
def test_a_missing_package_is_named(metric: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        chosen_metrics(questions(sample()), [metric])
    assert caught.value.name == package
    assert str(caught.value).startswith(
        f"the metric {metric} needs {package}: pip install 'palkernels[evaluate]' (import of {package} halted"
    )
