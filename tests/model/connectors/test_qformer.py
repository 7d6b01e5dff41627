"""The Q-Former against transformers' own, clip by clip and without padding."""

from typing import Any

import pytest
import torch
from support.connectors import small_qformer
from transformers import Blip2QFormerConfig, Blip2QFormerModel


def test_is_blip2s_with_learnt_queries() -> None:
    """Each clip, without padding, gives what transformers' Q-Former gives with the same weights."""
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
    for clip, length in enumerate(lengths.tolist()):
        gathered = model(query_embeds=connector.queries, encoder_hidden_states=states[clip : clip + 1, :length])
        torch.testing.assert_close(connected[clip], connector.projection(gathered.last_hidden_state)[0])


def test_does_not_depend_on_padding() -> None:
    """Neither the content of padding, NaN included, nor its length matters; an empty clip's states are finite."""
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


def test_trains_every_weight_and_the_encoder() -> None:
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
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        small_qformer(**settings)
