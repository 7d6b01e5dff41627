"""What of an answer counts."""

import pytest

from palkernels.model.evaluation.normalisation import normalised, words


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Red.", "red"),
        ("  two\n words ", "two words"),
        ("«It\u2019s» (the) 'RED' one!", "it's the red one"),
        ("don't", "don't"),
        ("-3.5", "-3.5"),
        ("\u22123,5", "-3,5"),  # a minus sign
        ("- a dash - between", "a dash between"),
        ("50 %, 12:30; $5", "50 % 12:30 $5"),
        ("ice-cream", "ice-cream"),
        ("STRASSE straße", "strasse strasse"),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),  # noqa: RUF001
        ("。你好！", "你好"),  # noqa: RUF001
        ("...", ""),
        ("", ""),
    ],
)
def test_what_counts(text: str, counts: str) -> None:
    assert normalised(text) == counts
    assert normalised(counts) == counts
    assert words(text) == counts.split()


@pytest.mark.parametrize(("one", "other"), [("-5", "5"), ("3.5", "35"), ("$5", "5"), ("the dog", "dog")])
def test_what_is_another_answer(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)
