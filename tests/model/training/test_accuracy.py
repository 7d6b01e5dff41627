"""When a held-out answer counts as right."""

import torch

from palkernels.model.training.accuracy import _answers

END, BREAK, VOCABULARY = 7, 3, 10


def logits_of(tokens):
    return torch.nn.functional.one_hot(torch.tensor([tokens]), VOCABULARY).float()


def foretold(said, asked=(1, 2), answer=(5, 6, END, BREAK)):
    """Whether the whole text is, of a model that says `said` where the answer's tokens are."""
    ids = torch.tensor([[*asked, *answer]])
    wanted = torch.tensor([[-100] * (len(asked) - 1) + list(answer) + [-100]])
    counts, _, right = _answers(logits_of([0, *said, 0]), wanted, ids == END)
    assert counts.sum() == len(answer)
    return bool(right.all())


def test_an_answer_is_right_up_to_its_end():
    assert foretold((5, 6, END, BREAK))
    assert foretold((5, 6, END, 9))  # nobody asks for what stands behind the end
    assert not foretold((5, 6, 9, BREAK))  # it would have gone on
    assert not foretold((5, 9, END, BREAK))
    assert not foretold((9, 6, END, BREAK))
