"""What all connectors have in common: a config that rebuilds them, and one way to refuse what does not fit."""

import json

import pytest
import torch
from support.connectors import small_qformer

from palkernels.model import CONNECTORS, Connector, LfstConnector, MlpConnector
from palkernels.model.connectors.audio_grid import AudioGrid


@pytest.mark.parametrize("name", CONNECTORS)
def test_config_rebuilds_it(name: str) -> None:
    """A config that went through JSON makes a connector of the same shape, which takes the weights."""
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
