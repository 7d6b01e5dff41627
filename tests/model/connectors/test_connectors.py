"""Connectors of one encoder: the shapes and the functions they promise; what all connectors have in common."""

import json
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from palkernels.model.connectors.base import CONNECTORS, Connector, LfstConnector, MlpConnector, QFormerConnector
from palkernels.model.connectors.lfst import AudioGrid


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 0, 6)])
def test_keeps_leading_dimensions(shape: tuple[int, ...]) -> None:
    assert MlpConnector(6, 10)(torch.randn(shape)).shape == (*shape[:-1], 10)


def test_is_linear_gelu_linear() -> None:
    connector = MlpConnector(6, 10)
    states = torch.randn(4, 6)
    weights = dict(connector.named_parameters())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "linear_1.weight": (10, 6),
        "linear_1.bias": (10,),
        "linear_2.weight": (10, 10),
        "linear_2.bias": (10,),
    }
    hidden = states @ weights["linear_1.weight"].T + weights["linear_1.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))  # the exact GELU, not its tanh form
    expected = functional.linear(hidden, weights["linear_2.weight"], weights["linear_2.bias"])
    torch.testing.assert_close(connector(states), expected)


def test_positions_do_not_mix() -> None:
    connector = MlpConnector(6, 10)
    states = torch.randn(5, 6)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(connector(states)[order], connector(states[order]))


def test_every_weight_is_trained() -> None:
    connector = MlpConnector(6, 10)
    connector(torch.randn(4, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in connector.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4), "input_size must be a positive integer, got 0"),
        ((4, -1), "hidden_size must be a positive integer, got -1"),
        ((4, 2.0), "hidden_size must be a positive integer, got 2.0"),
        ((True, 4), "input_size must be a positive integer, got True"),
    ],
)
def test_refuses_bad_sizes(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MlpConnector(*sizes)


@pytest.mark.parametrize("shape", [(6, 4), ()])
def test_refuses_states_of_another_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^states must have shape \(\.\.\., 6\), got \("):
        MlpConnector(6, 10)(torch.randn(shape))


def small_qformer(**changes) -> QFormerConnector:
    torch.manual_seed(0)
    settings = {"num_queries": 5, "num_layers": 3, "width": 16, "num_heads": 2, "cross_attention_frequency": 2}
    return QFormerConnector(6, 10, **(settings | changes)).double().eval()


def test_qformer_is_blip2s_with_learnt_queries() -> None:
    """Against transformers' Q-Former, row by row and unpadded, with this one's weights."""
    connector = small_qformer()
    config = Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, encoder_hidden_size=6
    )
    model = Blip2QFormerModel(config).double().eval()
    model.load_state_dict(connector.qformer.state_dict())
    states, lengths = torch.randn(3, 9, 6, dtype=torch.float64), torch.tensor([9, 1, 4])
    connected, valid = connector.connect(states, lengths)
    assert connected.shape == (3, 5, 10)
    assert valid is not None
    assert valid.tolist() == [5, 5, 5]
    for row, length in enumerate(lengths.tolist()):
        gathered = model(query_embeds=connector.queries, encoder_hidden_states=states[row : row + 1, :length])
        torch.testing.assert_close(connected[row], connector.projection(gathered.last_hidden_state)[0])


def test_qformer_does_not_depend_on_padding() -> None:
    """Not on what it holds, NaN included, nor on how much there is; a row without audio is finite."""
    connector = small_qformer()
    states, lengths = torch.randn(3, 9, 6, dtype=torch.float64), torch.tensor([4, 0, 9])
    connected, valid = connector.connect(states, lengths)
    assert valid is not None
    assert valid.tolist() == [5, 0, 5]
    assert connected.isfinite().all()
    poisoned = states.clone()
    poisoned[0, 4:], poisoned[1] = float("nan"), float("inf")
    assert torch.equal(connector(poisoned, lengths), connected)
    torch.testing.assert_close(connector(states[:1, :4])[0], connected[0])
    assert connector.connect(states)[1] is None


def test_qformer_trains_every_weight_and_the_encoder() -> None:
    connector = small_qformer().train()
    states = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    connector(states, torch.tensor([9, 4])).square().sum().backward()
    assert states.grad is not None
    assert (states.grad.abs().sum(-1) > 0).sum().item() == 13
    # A key's bias moves all scores of a query alike.
    trained = {name for name, p in connector.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-12}
    assert {name for name, _ in connector.named_parameters()} - trained == {
        name for name, _ in connector.named_parameters() if name.endswith("attention.key.bias")
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries": 0}, "num_queries must be a positive integer, got 0"),
        ({"num_heads": 3}, "num_heads must divide the width 16, got 3"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
    ],
)
def test_qformer_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        small_qformer(**settings)


def test_mlp_keeps_lengths() -> None:
    connector, states, lengths = MlpConnector(6, 10), torch.randn(2, 3, 6), torch.tensor([3, 1])
    connected, valid = connector.connect(states, lengths)
    assert torch.equal(connected, connector(states))
    assert valid is not None
    assert torch.equal(valid, lengths)
    assert connector.connect(states)[1] is None


@pytest.mark.parametrize("name", CONNECTORS)
def test_config_rebuilds_it(name: str) -> None:
    """Through JSON: one of the same shape, which takes the weights."""
    grids = (AudioGrid(4, 2, 1.0, 8, 0.0, 4_000.0), AudioGrid(3, 4, 1.5, 16, 50.0, 8_000.0, "slaney"))
    connector: Connector = {
        "mlp": MlpConnector(6, 10),
        "qformer": small_qformer(dropout=0.0),
        "lfst": LfstConnector((6, 6), 10, grids, width=8, num_heads=2, depth=2),
    }[name].float()
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
    """What does not fit is named, by every connector of one encoder alike."""
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
