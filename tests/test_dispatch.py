"""The one rule that chooses an implementation."""

import pytest

from palkernels.dispatch import choose

REASONS = ["triton must be installed", "D must be at most 256, got 512"]


@pytest.mark.parametrize(
    ("impl", "reasons", "on_cuda", "runs"),
    [
        ("auto", [], True, "triton"),
        ("auto", [], False, "sdpa"),  # the interpreter runs only where it is asked for
        ("auto", REASONS, True, "sdpa"),
        ("auto", REASONS, False, "sdpa"),
        ("triton", [], False, "triton"),
        ("sdpa", [], True, "sdpa"),
        ("sdpa", REASONS, True, "sdpa"),
        ("reference", REASONS, False, "reference"),
    ],
)
def test_choice(impl, reasons, on_cuda, runs):
    assert choose(impl, reasons, on_cuda=on_cuda) == runs


def test_triton_that_cannot_run_names_every_reason():
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: triton must be installed; D must be at most 256"):
        choose("triton", REASONS, on_cuda=True)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'sdpa', 'reference', got 'cuda'"):
        choose("cuda", [], on_cuda=True)
