"""What is remembered of a prompt's last row from step to step."""

import torch

from palkernels.model.vllm.foretelling import SPARE, LastStates


def states(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1).expand(-1, 3)


def remembered(last, *slots):
    return last.get(torch.tensor(slots))[:, 0].tolist()


def test_the_latest_is_found():
    """A slot has another request's row later."""
    last = LastStates(1, states(0))
    last.put(torch.tensor([7, 0]), states(1, 2))
    last.put(torch.tensor([3, 7]), states(3, 4))
    assert remembered(last, 7, 3, 0) == [4, 3, 2]


def test_what_is_forgotten_is_not_a_number():
    last = LastStates(2, states(0))
    assert torch.isnan(last.get(torch.tensor([0]))).all()
    for slot in range(SPARE + 8 + 1):
        last.put(torch.tensor([slot]), states(slot))
    assert torch.isnan(last.get(torch.tensor([0]))).all()
    assert remembered(last, 1, SPARE + 8) == [1, SPARE + 8]
