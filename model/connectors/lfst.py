"""LFST: a learnt token in every time-frequency cell gathers what two encoders have there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from palkernels.model.connectors.audio_grid import CLAP_GRID, SSLAM_GRID, AudioGrid, cell_windows
from palkernels.model.connectors.base import (
    Connector,
    States,
    check_heads,
    check_positive,
    checked_lengths,
    describe,
    start_point,
    valid_mask,
    values_are_checked,
)
from palkernels.model.connectors.mlp import MlpConnector

__all__ = ["AggregatorLayer", "LfstConnector"]


class LfstConnector(Connector):
    """LFST, the connector of PAL (arXiv 2506.10423) that fuses SSLAM and CLAP.

    It is the spatial aggregator of Cambrian-1 (arXiv 2406.16860) over time and frequency: one learnt token stands in
    every time-frequency cell and is updated, layer by layer, by cross-attention to what each encoder has at that cell.

    The cells are the first encoder's grid. A cell sees those tokens of each encoder that :func:`cell_windows` gives it:
    with the default grids its own SSLAM token, and the CLAP token that covers it in seconds and hertz. The result
    holds, for each time step, its cells from low to high frequency and then a learnt newline token: 64 x (8 + 1) = 576
    states with the default grids.

    As in Cambrian-1, each encoder's states first pass Linear, GELU, Linear, LayerNorm. Every cell is told the mean of
    the first encoder's states, for the whole clip. An :class:`MlpConnector` ends in the language model's width. The
    paper does not give the sizes: the defaults are Cambrian-1's.

    Args:
        input_sizes: Width of each encoder's states, at least one; SSLAM's and CLAP's are 768.
        hidden_size: Width of the language model's states.
        grids: Each encoder's :class:`AudioGrid`, or its arguments by name.
        width, num_heads, depth: Shape of the aggregator and its number of layers.

    Raises:
        ValueError: A size is not a positive integer, the heads do not divide the width, or there is not one grid per
            encoder.
    """

    tower_types = ("sslam", "clap")

    def __init__(
        self,
        input_sizes: Sequence[int],
        hidden_size: int,
        grids: Sequence[AudioGrid | Mapping[str, Any]] = (SSLAM_GRID, CLAP_GRID),
        width: int = 1024,
        num_heads: int = 16,
        depth: int = 3,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "width": width, "num_heads": num_heads, "depth": depth}
        check_positive(**sizes, **{f"input_sizes[{i}]": size for i, size in enumerate(input_sizes)})
        check_heads(num_heads, width)
        if not input_sizes or len(grids) != len(input_sizes):
            raise ValueError(f"grids must be one for each of input_sizes, got {len(grids)} for {len(input_sizes)}")
        self.grids = tuple(grid if isinstance(grid, AudioGrid) else AudioGrid(**grid) for grid in grids)
        self.config = sizes | {"input_sizes": list(input_sizes), "grids": [asdict(grid) for grid in self.grids]}
        self.input_sizes = tuple(input_sizes)
        # No buffers: they are not weights, and a model that is built without values would leave them without.
        self.windows = [cell_windows(self.grids[0], grid) for grid in self.grids]

        self.encoder_projections = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
            for size in input_sizes
        )
        self.query = nn.Parameter(torch.empty(width))
        self.newline = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()
        slots = [index.shape[1] for index, _ in self.windows]
        self.layers = nn.ModuleList(AggregatorLayer(width, num_heads, slots) for _ in range(depth))
        self.projection = MlpConnector(width, hidden_size)

    def reset_parameters(self) -> None:
        """Draw the cells' first state and the newline token."""
        for token in (self.query, self.newline):
            init.normal_(token, std=token.numel() ** -0.5)

    def forward(self, states: tuple[Tensor, ...], lengths: Tensor | None = None) -> Tensor:
        """Return the states of :meth:`connect`, in the weights' dtype.

        With the defaults ((B, 512, 768), (B, 64, 768)) becomes (B, 576, hidden_size). Each encoder's states are in its
        grid's time-major order. What lies beyond ``lengths`` does not change what is valid. The first encoder's may be
        cut to fewer time steps, as :func:`cut_padding` does: the result has these steps.
        """
        encoders, lengths = self._checked(states, lengths)
        batch, freq = encoders[0].shape[0], self.grids[0].freq
        time = encoders[0].shape[1] // freq
        padded = None
        if lengths is not None:
            padded = ~valid_mask(lengths, encoders[0]).unsqueeze(-1)
            encoders[0] = encoders[0].masked_fill(padded, 0)
        encoders = [project(x) for project, x in zip(self.encoder_projections, encoders, strict=True)]
        if padded is None or lengths is None:
            context = encoders[0].mean(dim=1)
        else:
            context = encoders[0].masked_fill(padded, 0).sum(dim=1) / lengths.clamp(min=1).unsqueeze(1)

        windows = [tuple(x[: time * freq].to(context.device) for x in window) for window in self.windows]
        cells = self.query.expand(batch, time * freq, -1)
        for layer in self.layers:
            cells = layer(cells, context, encoders, windows)
        projected = self.projection(cells).unflatten(1, (time, freq))
        newlines = self.newline.to(projected.dtype).expand(batch, time, 1, -1)
        return torch.cat([projected, newlines], dim=2).flatten(1, 2)

    def connect(self, states: States, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Connect as :meth:`Connector.connect` says. ``lengths`` count the first encoder's states in whole time steps:
        multiples of its grid's freq (8), which become multiples of freq + 1 (9)."""
        _, checked = self._checked(states, lengths)
        return self(states, lengths), None if checked is None else self.output_lengths(checked)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return ``lengths`` of the first encoder's states, and one newline more for every time step."""
        freq = self.grids[0].freq
        return lengths.long() // freq * (freq + 1)

    def start_at(self, direction: Tensor) -> None:
        """Start as :meth:`Connector.start_at` says, the newline too."""
        self.projection.start_at(direction)
        with torch.no_grad():
            self.newline.add_(start_point(direction))

    def _checked(self, states: States, lengths: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Return each encoder's states, and the lengths, after checking that they fit."""
        expected = [("B", grid.num_tokens, size) for grid, size in zip(self.grids, self.input_sizes, strict=True)]
        if isinstance(states, Tensor) or not all(isinstance(x, Tensor) for x in states):
            raise TypeError(f"states must be a tuple of {len(expected)} tensors, got {describe(states)}")
        shapes = [tuple(x.shape) for x in states]
        wanted = [shape[1:] for shape in expected]
        count = states[0].shape[1] if states and states[0].ndim == 3 else 0
        wanted[0] = (min(count, self.grids[0].num_tokens), self.input_sizes[0])
        if [shape[1:] for shape in shapes] != wanted or len({x[0] for x in shapes}) != 1:
            raise ValueError(f"states must have shapes {_shapes(expected)}, got {_shapes(shapes)}")
        lengths = checked_lengths(lengths, states[0])
        freq = self.grids[0].freq
        if lengths is not None and values_are_checked(lengths) and bool((lengths % freq != 0).any()):
            raise ValueError(f"lengths must be multiples of {freq}, whole time steps, got {lengths.tolist()}")
        if count % freq or not count:
            raise ValueError(f"states of the first encoder must be whole time steps of {freq}, got {count} states")
        return list(states), lengths


class AggregatorLayer(nn.Module):
    """One layer of Cambrian-1's spatial aggregator, of the kind with one softmax over all encoders' windows.

    With q a cell's token, g the clip's mean and e_is the token of encoder i in slot s of the cell's window:

        x = W_in [q ; W_g g]
        k_is = W_k,i norm_k,i(e_is + p_is);  v_is = W_v,i norm_v,i(e_is + p_is)
        x = x + W_o softmax(W_q norm(x) . k) v      over all i and s, in each head
        q = q + W_2 gelu(W_1 norm(x))

    p_is are learnt, and exist only for encoders whose windows have several slots. No Linear has a bias.

    Args:
        width: Of cells and encoders' tokens.
        num_heads: Attention heads.
        slots: Slots in a cell's window, for each encoder.
    """

    def __init__(self, width: int, num_heads: int, slots: Sequence[int]) -> None:
        super().__init__()

        def linear(input_size: int) -> nn.Linear:
            return nn.Linear(input_size, width, bias=False)

        self.num_heads = num_heads
        self.context = linear(width)
        self.input = linear(2 * width)
        self.to_query = nn.Sequential(nn.LayerNorm(width), linear(width))
        self.to_key = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), linear(width)) for _ in slots)
        self.to_value = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), linear(width)) for _ in slots)
        self.places = Places({str(i): torch.empty(n, width) for i, n in enumerate(slots) if n > 1})
        self.attended = linear(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(linear(width), nn.GELU(), linear(width))

    def forward(
        self,
        cells: Tensor,  # (B, C, width)
        context: Tensor,  # (B, width)
        encoders: list[Tensor],  # (B, N_i, width)
        windows: list[tuple[Tensor, Tensor]],  # (C, W_i): token numbers, and whether they are seen
    ) -> Tensor:
        """Return the updated cells (B, C, width)."""
        told = self.context(context).unsqueeze(1).expand(-1, cells.shape[1], -1)
        hidden = self.input(torch.cat([cells, told], dim=-1))
        query = self._heads(self.to_query(hidden))  # (B, C, H, D)
        keys, values = [], []
        for i, (encoded, (index, _)) in enumerate(zip(encoders, windows, strict=True)):
            if str(i) in self.places:
                local = encoded[:, index] + self.places[str(i)]  # (B, C, W_i, width)
                keys.append(self._heads(self.to_key[i](local)))
                values.append(self._heads(self.to_value[i](local)))
            else:  # cells may share a token, which is projected once
                keys.append(self._heads(self.to_key[i](encoded))[:, index])
                values.append(self._heads(self.to_value[i](encoded))[:, index])
        key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)  # (B, C, W, H, D)
        seen = torch.cat([seen for _, seen in windows], dim=1)
        scores = torch.einsum("bchd,bcwhd->bcwh", query, key) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen.unsqueeze(-1), float("-inf")).softmax(dim=2)
        attended = torch.einsum("bcwh,bcwhd->bchd", weights, value)
        hidden = self.norm(hidden + self.attended(attended.flatten(2)))
        updated: Tensor = cells + self.mlp(hidden)
        return updated

    def _heads(self, projected: Tensor) -> Tensor:
        """(..., width) to (..., heads, width / heads)."""
        return projected.view(*projected.shape[:-1], self.num_heads, -1)


class Places(nn.ParameterDict):
    """What is added to the tokens of a window, (slots, width) by the encoder's number."""

    def __init__(self, places: Mapping[str, Tensor]) -> None:
        super().__init__(places)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for place in self.parameters():
            init.normal_(place)


def _shapes(shapes: Sequence[tuple[object, ...]]) -> str:
    return ", ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
