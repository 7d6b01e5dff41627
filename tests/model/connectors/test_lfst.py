"""LFST against a loop over its cells."""

import pytest
import torch
from support.connectors import COARSE, FINE, FINE_IN_TIME, seen_tokens
from torch.nn.functional import gelu, layer_norm

from palkernels.model import LfstConnector
from palkernels.model.connectors.audio_grid import cell_windows


def by_hand(connector, states, lengths):
    """The connector's result for one clip, cell by cell and head by head, in valid time steps only."""
    grid = connector.grids[0]
    steps = grid.time if lengths is None else int(lengths) // grid.freq
    weights = dict(connector.named_parameters())

    def linear(name, x):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(name, x):
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    encoded = []
    for i, x in enumerate(states):
        x = linear(f"encoder_projections.{i}.2", gelu(linear(f"encoder_projections.{i}.0", x)))
        encoded.append(norm(f"encoder_projections.{i}.3", x))
    mean = encoded[0][: steps * grid.freq].mean(dim=0)
    heads, out = connector.config["num_heads"], []
    windows = [seen_tokens(grid, other) for other in connector.grids]
    slots = [cell_windows(grid, other)[1] for other in connector.grids]
    for t in range(steps):
        for f in range(grid.freq):
            cell, token = t * grid.freq + f, connector.query
            for n in range(connector.config["depth"]):
                at = f"layers.{n}"
                hidden = linear(f"{at}.input", torch.cat([token, linear(f"{at}.context", mean)]))
                query = linear(f"{at}.to_query.1", norm(f"{at}.to_query.0", hidden)).view(heads, -1)
                keys, values = [], []
                for i, window in enumerate(windows):
                    for slot, seen in zip(slots[i][cell].nonzero()[:, 0].tolist(), window[cell], strict=True):
                        local = encoded[i][seen]
                        if f"{at}.places.{i}" in weights:
                            local = local + weights[f"{at}.places.{i}"][slot]
                        keys.append(linear(f"{at}.to_key.{i}.1", norm(f"{at}.to_key.{i}.0", local)).view(heads, -1))
                        values.append(
                            linear(f"{at}.to_value.{i}.1", norm(f"{at}.to_value.{i}.0", local)).view(heads, -1)
                        )
                gathered = []
                for h in range(heads):
                    scores = torch.stack([query[h] @ key[h] / query.shape[1] ** 0.5 for key in keys])
                    share = scores.exp() / scores.exp().sum()
                    gathered.append(sum(s * value[h] for s, value in zip(share, values, strict=True)))
                hidden = norm(f"{at}.norm", hidden + linear(f"{at}.attended", torch.cat(gathered)))
                token = token + linear(f"{at}.mlp.2", gelu(linear(f"{at}.mlp.0", hidden)))
            out.append(linear("projection.linear_2", gelu(linear("projection.linear_1", token))))
        out.append(connector.newline)
    return torch.stack(out)


PAIRS = {"finer": (COARSE, FINE), "ragged": (COARSE, FINE_IN_TIME), "coarser": (FINE, COARSE), "one": (COARSE,)}


def connector_of(grids, depth=2):
    torch.manual_seed(0)
    connector = LfstConnector([5 + i for i in range(len(grids))], 9, grids, width=8, num_heads=2, depth=depth)
    states = tuple(torch.randn(3, grid.num_tokens, 5 + i, dtype=torch.float64) for i, grid in enumerate(grids))
    return connector.double(), states


@pytest.mark.parametrize("pair", PAIRS)
def test_against_a_loop_over_cells(pair):
    """Any grids, three clips of which one is empty: float64 within 1e-10, a newline after every time step."""
    grids = PAIRS[pair]
    connector, states = connector_of(grids)
    time, freq = grids[0].time, grids[0].freq
    lengths = torch.tensor([time, 2, 0]) * freq
    connected, valid = connector.connect(states, lengths)
    assert connected.shape == (3, time * (freq + 1), 9)
    assert valid.tolist() == [time * (freq + 1), 2 * (freq + 1), 0]
    for clip in range(2):
        want = by_hand(connector, [x[clip] for x in states], lengths[clip])
        torch.testing.assert_close(connected[clip, : valid[clip]], want, rtol=0, atol=1e-10)
    whole, nothing = connector.connect(states)
    assert nothing is None
    torch.testing.assert_close(whole[0], connected[0], rtol=0, atol=1e-12)
    assert torch.equal(whole.view(3, time, freq + 1, 9)[:, :, -1], connector.newline.expand(3, time, -1))


def test_default_sizes():
    """512 SSLAM and 64 CLAP tokens become 512 cells and 64 newlines; a clip of 12 steps has 108 valid states."""
    connector = LfstConnector((768, 768), 24, width=16, num_heads=2, depth=1)
    connected, lengths = connector.connect((torch.randn(1, 512, 768), torch.randn(1, 64, 768)), torch.tensor([96]))
    assert connected.shape == (1, 576, 24)
    assert lengths.tolist() == [108]


def test_does_not_depend_on_padding():
    """Valid states and gradients are the same whatever the padding holds."""
    connector, states = connector_of((FINE, COARSE))
    lengths = torch.tensor([36, 96, 12])
    grads = []
    for padding in (0.0, float("nan")):
        sslam = states[0].clone()
        sslam[0, 36:], sslam[2, 12:] = padding, padding
        connected, valid = connector.connect((sslam, states[1]), lengths)
        kept = torch.cat([clip[:n] for clip, n in zip(connected, valid.tolist(), strict=True)])
        connector.zero_grad()
        kept.square().sum().backward()
        grads.append([kept.detach(), *(p.grad for p in connector.parameters())])
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


def test_fewer_time_steps():
    """States of whole time steps alone give what a clip of that length gives, without lengths too."""
    connector, states = connector_of((COARSE, FINE))
    whole, _ = connector.connect(states, torch.tensor([6, 6, 6]))
    cut, lengths = connector.connect((states[0][:, :6], states[1]))
    assert lengths is None
    assert cut.shape == (3, 8, 9)
    torch.testing.assert_close(cut, whole[:, :8], rtol=0, atol=1e-12)
    for count in (0, 7):
        with pytest.raises(ValueError, match=rf"^states of the first .* whole time steps of 3, got {count} states$"):
            connector.connect((states[0][:, :count], states[1]))


def test_gradients_reach_both_encoders_and_every_weight():
    connector, states = connector_of((COARSE, FINE))
    for x in states:
        x.requires_grad_()
    connector(states).square().sum().backward()
    for x in states:
        assert (x.grad.abs().sum(dim=-1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in connector.parameters())


def test_built_without_values():
    """Built on the meta device the connector knows its cells' tokens all the same: only weights must be loaded."""
    connector, states = connector_of((COARSE, FINE))
    with torch.device("meta"):
        empty = LfstConnector(**connector.config)
    empty.load_state_dict(connector.state_dict(), assign=True)
    assert torch.equal(empty(states), connector(states))


def test_refuses():
    connector, states = connector_of((COARSE, FINE))
    with pytest.raises(TypeError, match=r"^states must be a tuple of 2 tensors, got torch.float64$"):
        connector.connect(states[0])
    with pytest.raises(ValueError, match=r"^states must have shapes \(B, 12, 5\), \(B, 96, 6\), got \(3, 12, 5\), "):
        connector.connect((states[0], states[1][:, 1:]))
    with pytest.raises(ValueError, match=r"^states must have shapes .*, got \(3, 12, 5\)$"):
        connector.connect(states[:1])
    with pytest.raises(ValueError, match=r"^lengths must be multiples of 3, whole time steps, got \[3, 4, 0\]$"):
        connector.connect(states, torch.tensor([3, 4, 0]))
    with pytest.raises(ValueError, match=r"^grids must be one for each of input_sizes, got 2 for 1$"):
        LfstConnector((768,), 8)
    with pytest.raises(ValueError, match=r"^input_sizes\[1\] must be a positive integer, got 0$"):
        LfstConnector((768, 0), 8)
    with pytest.raises(ValueError, match=r"^num_heads must divide the width 10, got 4$"):
        LfstConnector((768, 768), 8, width=10, num_heads=4)
