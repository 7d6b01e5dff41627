"""The MLP: Linear, GELU, Linear, the same for every position."""

import pytest
import torch
from torch.nn import functional

from palkernels.model import MlpConnector


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


def test_keeps_lengths() -> None:
    connector, states, lengths = MlpConnector(6, 10), torch.randn(2, 3, 6), torch.tensor([3, 1])
    connected, valid = connector.connect(states, lengths)
    assert torch.equal(connected, connector(states))
    assert valid is not None
    assert torch.equal(valid, lengths)
    assert connector.connect(states)[1] is None
