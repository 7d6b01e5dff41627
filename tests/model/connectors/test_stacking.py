"""Neighbouring states joined to one before a connector."""

import json
from typing import Any

import pytest
import torch
from support.connectors import small_qformer

from palkernels.model import CONNECTORS, Connector, MlpConnector
from palkernels.model.connectors.base import cut_padding, stacked


def make(name: str, **changes: Any) -> Connector:
    """From width 6 to width 10, float64."""
    torch.manual_seed(1)
    return MlpConnector(6, 10, **changes).double() if name == "mlp" else small_qformer(dropout=0.0, **changes)


def joined_by_hand(clip: torch.Tensor, stack: int) -> torch.Tensor:
    """A clip's valid states (n, width), one group after the other."""
    groups = []
    for start in range(0, len(clip), stack):
        group = clip[start : start + stack].flatten().tolist()
        groups.append(group + [0.0] * (stack * clip.shape[1] - len(group)))
    return torch.tensor(groups, dtype=torch.float64).reshape(-1, stack * clip.shape[1])


@pytest.mark.parametrize("stack", [2, 3, 4, 20])
@pytest.mark.parametrize("name", ["mlp", "qformer"])
def test_each_clip_is_that_of_its_groups_alone(name: str, stack: int) -> None:
    """What a connector without stacking makes of the groups that were joined by hand; padding may hold NaN."""
    connector = make(name, stack=stack)
    config = {**connector.config, "input_size": 6 * stack, "stack": 1}
    plain = CONNECTORS[name](**config).double().eval()
    plain.load_state_dict(connector.state_dict())
    states, lengths = torch.randn(5, 9, 6, dtype=torch.float64), torch.tensor([9, 1, 4, 8, 0])
    poisoned = states.clone()
    poisoned[torch.arange(9) >= lengths.unsqueeze(1)] = torch.nan
    expected = [-(-n // stack) for n in lengths.tolist()]
    for inputs in (states, poisoned, cut_padding(poisoned[1:], lengths[1:])):
        of_clips = lengths[-len(inputs) :]
        connected, valid = connector.connect(inputs, of_clips)
        assert valid is not None
        assert valid.tolist() == connector.output_lengths(of_clips).tolist()
        if name == "mlp":
            assert valid.tolist() == expected[-len(inputs) :]
        for clip, (length, count) in enumerate(zip(of_clips.tolist(), valid.tolist(), strict=True)):
            if length:
                groups = joined_by_hand(states[clip - len(inputs)][:length], stack)
                want, _ = plain.connect(groups[None])
                torch.testing.assert_close(connected[clip, :count], want[0], rtol=1e-12, atol=1e-12)


def test_without_lengths_all_states_are_valid() -> None:
    connector, states = make("mlp", stack=4), torch.randn(2, 9, 6, dtype=torch.float64)
    connected, valid = connector.connect(states)
    assert valid is None
    assert connected.shape == (2, 3, 10)
    torch.testing.assert_close(connected, connector.connect(states, torch.tensor([9, 9]))[0])


def test_gradients_reach_valid_states_alone() -> None:
    connector = make("mlp", stack=2)
    states = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    connected, valid = connector.connect(states, torch.tensor([5, 2]))
    assert valid is not None
    sum(clip[:n].square().sum() for clip, n in zip(connected, valid.tolist(), strict=True)).backward()
    assert states.grad is not None
    assert (states.grad.abs().sum(-1) > 0).tolist() == [[True] * 5, [True, True, False, False, False]]
    assert states.grad.isfinite().all()


def test_one_is_none() -> None:
    """It is the default, which reads the weights and configs of connectors from before there was a choice."""
    states, lengths = torch.randn(2, 5, 6), torch.tensor([5, 2])
    assert stacked(states, lengths, 1) == (states, lengths)
    for name in ("mlp", "qformer"):
        connector = make(name)
        earlier = {key: value for key, value in connector.config.items() if key != "stack"}
        again = CONNECTORS[name](**json.loads(json.dumps(earlier))).double()
        again.load_state_dict(connector.state_dict())
        assert again.config == connector.config
        assert connector.config["stack"] == 1


@pytest.mark.parametrize("stack", [0, -2, 2.0, True, None])
def test_refuses_what_is_no_count(stack: Any) -> None:
    for name in ("mlp", "qformer"):
        with pytest.raises(ValueError, match=f"^stack must be a positive integer, got {stack}$"):
            make(name, stack=stack)
