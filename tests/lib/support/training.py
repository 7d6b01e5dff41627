"""A batch to train an attached model on, and the gradients that it gives."""

import torch

from palkernels.model import AudioState

WIDTH = 64
TOKENS = 6


def inputs(dtype=torch.float64, rows=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 101, (rows, 8), generator=generator)
    states = torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return ids, states, torch.tensor([2, 0, 3, 1])[:rows]


def gradients(model):
    ids, states, insert_at = inputs()
    states.requires_grad_()
    model(ids, labels=ids, audio=AudioState(states, insert_at=insert_at)).loss.backward()
    results = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**results, "states": states.grad}


def same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
