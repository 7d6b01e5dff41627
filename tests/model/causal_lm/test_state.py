"""Fields of an AudioState that do not fit each other, and its move to another device."""

from collections import UserList

import pytest
import torch
from support.attached import WIDTH
from support.oracles import build
from support.training import inputs

from palkernels.model import AudioState, attach


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"states": []}, ValueError, "states must hold at least one tensor"),
        ({"states": 3}, TypeError, "states must be a tensor or a list of them, got int"),
        ({"states": torch.zeros(2, 3)}, ValueError, r"states must be \(A, N, d\)"),
        (
            {"states": torch.zeros(2, 3, 4).int()},
            TypeError,
            "states must be floating-point tensors, got torch.int32",
        ),
        ({"states": [torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)]}, ValueError, "of one shape in all layers"),
        ({"lengths": torch.tensor([1])}, ValueError, r"lengths must be \(A,\) = \(2,\)"),
        (
            {"lengths": torch.tensor([1, 4])},
            ValueError,
            "lengths must be from 0 to 3, got values from 1 to 4",
        ),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths must have an integer dtype"),
        ({"lengths": [1, 2]}, TypeError, "lengths must be a tensor, got list"),
        ({"index": torch.tensor([2])}, ValueError, "index must be from 0 to 1, got values from 2 to 2"),
        ({"index": torch.tensor([[0]])}, ValueError, r"index must be \(B,\)"),
        ({"insert_at": torch.tensor([-1, 0])}, ValueError, "insert_at must be at least 0"),
        ({"insert_at": torch.tensor([0])}, ValueError, "insert_at must have a row per text row = 2"),
        (
            {"insert_at": torch.zeros(2, 4).long()},
            ValueError,
            r"insert_at must be \(B,\) or \(B, N\) with N = 3",
        ),
        ({"insert_at": torch.tensor([[1, 0, 2]] * 2)}, ValueError, "insert_at must not decrease"),
        ({"insert_at": torch.tensor([[5, 1, 0]] * 2).to(torch.uint8)}, ValueError, "insert_at must not decrease"),
        ({"lengths": torch.tensor([1, 9]).to(torch.uint16)}, ValueError, "lengths must be from 0 to 3"),
    ],
    ids=[
        "no states",
        "states of an int",
        "states of two dimensions",
        "states of integers",
        "states of two lengths",
        "lengths of another shape",
        "lengths beyond",
        "lengths of floats",
        "lengths in a list",
        "index beyond",
        "index of two dimensions",
        "insert_at below 0",
        "insert_at for one text",
        "insert_at for other tokens",
        "insert_at decreases",
        "insert_at of uint8 decreases",
        "lengths of uint16 beyond",
    ],
)
def test_invalid_state(fields, error, message):
    with pytest.raises(error, match=message):
        AudioState(**({"states": torch.zeros(2, 3, 4)} | fields))


def test_a_state_moves():
    _, states, insert_at = inputs(torch.float32)
    state = AudioState([states, None, states], lengths=torch.tensor([1, 2, 3, 4]), insert_at=insert_at)
    assert state.to("cpu") is state
    moved = state.to("meta", non_blocking=True)
    assert {x.device.type for x in (moved.states[0], moved.states[2], moved.lengths, moved.insert_at)} == {"meta"}
    assert moved.states[1] is None
    assert state.to(dtype=torch.float64).states[0].dtype == torch.float64
    for kind in (tuple, UserList):  # any sequence
        other = AudioState(kind([states, None]))
        assert other.to("cpu") is other
        assert other.to(dtype=torch.float64).states[0].dtype == torch.float64


def test_places_that_decrease_on_a_gpu(monkeypatch):
    """There a state does not read its values. The forward does, with everything else that it must know."""
    monkeypatch.setattr(AudioState, "checks_values", property(lambda state: False))
    state = AudioState(torch.zeros(1, 3, WIDTH), insert_at=torch.tensor([[1, 0, 2]]))
    model = build("llama")
    attach(model)
    with pytest.raises(ValueError, match="insert_at must not decrease"):
        model(torch.tensor([[1, 2, 3]]), audio=state)
