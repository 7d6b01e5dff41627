"""What all connectors have in common: a config that rebuilds them, and one way to refuse what does not fit."""

import json
from typing import Any

import pytest
import torch
from support.connectors import small_qformer
from support.counting import count_reads
from torch._subclasses.fake_tensor import FakeTensorMode

from palkernels.model import CONNECTORS, Connector, LfstConnector, MlpConnector
from palkernels.model.connectors.audio_grid import AudioGrid
from palkernels.model.connectors.base import cut_padding, cut_paddings


def small(name: str) -> Connector:
    """From width 6, for LFST twice, to width 10, in float32."""
    grids = (AudioGrid(4, 2, 1.0, 8, 0.0, 4_000.0), AudioGrid(3, 4, 1.5, 16, 50.0, 8_000.0, "slaney"))
    connectors: dict[str, Connector] = {
        "mlp": MlpConnector(6, 10),
        "qformer": small_qformer(dropout=0.0),
        "lfst": LfstConnector((6, 6), 10, grids, width=8, num_heads=2, depth=2),
    }
    return connectors[name].float()


@pytest.mark.parametrize("name", CONNECTORS)
def test_config_rebuilds_it(name: str) -> None:
    """A config that went through JSON makes a connector of the same shape, which takes the weights."""
    connector = small(name)
    config = json.loads(json.dumps(connector.config))
    again = CONNECTORS[name](**config)
    assert type(again) is type(connector)
    assert again.config == connector.config
    again.load_state_dict(connector.state_dict())
    states = (torch.randn(2, 8, 6), torch.randn(2, 12, 6)) if name == "lfst" else torch.randn(2, 8, 6)
    connected, lengths = connector.connect(states, torch.tensor([8, 4]))
    torch.testing.assert_close(again.eval().connect(states, torch.tensor([8, 4])), (connected, lengths))


@pytest.mark.parametrize("name", ["mlp", "qformer"])
def test_connect_refuses(name: str) -> None:
    """Every connector of one encoder refuses what does not fit, in the same words."""
    connector: Connector = MlpConnector(6, 10) if name == "mlp" else small_qformer().float()
    states = torch.randn(2, 3, 6)
    with pytest.raises(TypeError, match=r"^states must be one tensor, got a tuple of 2$"):
        connector.connect((states, states))
    with pytest.raises(ValueError, match=r"^states must have shape \(B, N, 6\), got \(2, 3, 5\)$"):
        connector.connect(states[..., :5])
    with pytest.raises(ValueError, match=r"^lengths must be from 0 to 3, got \[1, 4\]$"):
        connector.connect(states, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"^lengths must have shape \(2,\), got \(1,\)$"):
        connector.connect(states, torch.tensor([1]))
    with pytest.raises(TypeError, match=r"^lengths must be a tensor of integers, got torch.float32$"):
        connector.connect(states, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name", CONNECTORS)
def test_valid_states_and_gradients_are_the_same_without_padding(name: str) -> None:
    """Of the longest clip's 4 states of 8 a connector gets 4, and what it makes of valid ones stays as it was."""
    connector = small(name).double()
    first = torch.randn(3, 8, 6, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 12, 6, dtype=torch.float64)
    states = (first, second) if name == "lfst" else first
    lengths = torch.tensor([2, 4, 0])
    found = []
    for inputs in (states, cut_padding(states, lengths)):
        connector.zero_grad()
        first.grad = None
        connected, valid = connector.connect(inputs, lengths)
        assert valid is not None
        kept = torch.cat([clip[:n] for clip, n in zip(connected, valid.tolist(), strict=True)])
        kept.square().sum().backward()
        found.append([valid, kept.detach(), first.grad, *(p.grad for p in connector.parameters())])
        rows = connected.shape[1]
    assert rows == {"mlp": 4, "qformer": 5, "lfst": 6}[name]
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)


def test_padding_is_cut_to_the_longest_clip() -> None:
    states, second = torch.randn(3, 8, 6), torch.randn(3, 5, 4)
    assert torch.equal(cut_padding(states, torch.tensor([2, 7, 0])), states[:, :7])  # type: ignore[arg-type]
    assert cut_padding(states, torch.tensor([0, 0, 0], dtype=torch.int32)).shape == (3, 1, 6)  # type: ignore[union-attr]
    first, same = cut_padding((states, second), torch.tensor([3, 1, 2]))
    assert torch.equal(first, states[:, :3])
    assert same is second


@pytest.mark.parametrize(
    "lengths",
    [None, torch.tensor([8, 1, 1]), torch.tensor([9, 1, 1]), torch.tensor([1, -1, 1]), torch.tensor([1, 1]),
     torch.tensor([1.0, 1.0, 1.0]), torch.tensor([True, True, True]), [1, 1, 1],
     torch.tensor([1, 1, 1], device="meta")],
    ids=["none", "no padding", "too long", "negative", "too few", "floats", "bools", "list", "meta"],
)  # fmt: skip
def test_what_cannot_be_cut_stays(lengths: Any) -> None:
    """What does not fit is left for ``connect``, whose errors name the states' own number."""
    states = torch.randn(3, 8, 6)
    assert cut_padding(states, lengths) is states


def test_nothing_is_cut_without_values() -> None:
    """Fake tensors and compiled graphs keep their shapes, and the graph is whole."""
    states, lengths = torch.randn(3, 8, 6), torch.tensor([2, 1, 0])
    with FakeTensorMode() as mode:
        assert cut_padding(mode.from_tensor(states), mode.from_tensor(lengths)).shape == (3, 8, 6)  # type: ignore[union-attr]
    connector = small("mlp")

    def connect(states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return connector.connect(cut_padding(states, lengths), lengths)[0]

    compiled = torch.compile(connect, fullgraph=True, backend="eager")
    assert compiled(states, lengths).shape == (3, 8, 10)
    assert connect(states, lengths).shape == (3, 2, 10)


def test_lengths_of_several_connectors_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.randn(2, 8, 6), (torch.randn(2, 9, 6), torch.randn(2, 3, 6)), torch.randn(2, 7, 6)]
    lengths = [torch.tensor([2, 1]), torch.tensor([4, 5]), None]
    assert count_reads(lambda: cut_paddings(states, lengths), monkeypatch) == 1  # type: ignore[arg-type]
    assert count_reads(lambda: cut_paddings(states, [None] * 3), monkeypatch) == 0  # type: ignore[arg-type]
    cut = cut_paddings(states, lengths)  # type: ignore[arg-type]
    assert [x.shape[1] for x in (cut[0], *cut[1], cut[2])] == [2, 5, 3, 7]  # type: ignore[union-attr]
