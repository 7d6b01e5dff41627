"""Connectors: what turns audio encoders' states into states of the language model's width.

All are used alike: ``connect(states, lengths)`` gives states and lengths for an :class:`AudioState`, and ``config``
holds the arguments that make another of the same shape, ``CONNECTORS[name](**config)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from palkernels.model.connectors.lfst import CLAP_GRID, SSLAM_GRID, AggregatorLayer, AudioGrid, cell_windows

__all__ = ["CONNECTORS", "Connector", "LfstConnector", "MlpConnector", "QFormerConnector"]

States = torch.Tensor | tuple[torch.Tensor, ...]


class Connector(nn.Module):
    """What connectors have in common.

    Attributes:
        config: The constructor's arguments by name, as JSON can hold them.
    """

    config: dict[str, Any]

    def connect(self, states: States, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States for the language model, and how many of each row's are valid.

        Args:
            states: (B, N, input size) of one encoder; of several, a tuple with one tensor each.
            lengths: (B,), integers: valid states of each row, which come first; None: all N.

        Returns:
            states (B, M, hidden_size) and lengths (B,), int64; None where ``lengths`` is None.

        Raises:
            TypeError, ValueError: states or lengths that do not fit the connector or each other.
        """
        raise NotImplementedError

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """How many states of each row :meth:`connect` makes valid of ``lengths`` (B,); needs no weights."""
        return lengths.long()


class MlpConnector(Connector):
    """Linear, GELU, Linear: the two-layer MLP that LLaVA-1.5 and models like it put before their LLM.

    It maps (..., input_size) to (..., hidden_size) and treats every position alike, so it changes neither the
    number of audio tokens nor their order. The hidden layer is as wide as the output. GELU is the exact one.

    Args:
        input_size: Width of the encoder's states.
        hidden_size: Width of the language model's states.

    Raises:
        ValueError: A size is not a positive integer, or an input's last dimension is not `input_size`.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.config = {"input_size": input_size, "hidden_size": hidden_size}
        _check_positive(**self.config)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.linear_1 = nn.Linear(input_size, hidden_size)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., input_size) to (..., hidden_size), in the weights' dtype."""
        if states.shape[-1:] != (self.input_size,):
            raise ValueError(f"states must have shape (..., {self.input_size}), got {tuple(states.shape)}")
        output: torch.Tensor = self.linear_2(self.activation(self.linear_1(states)))
        return output

    def connect(self, states: States, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Connector.connect`; M is N, and lengths stay as they are."""
        states = _one_encoder(states, self.input_size)
        return self(states), _checked_lengths(lengths, states)


class QFormerConnector(Connector):
    """Learnt queries that gather a clip's states by cross-attention: the Q-Former of BLIP-2 (arXiv 2301.12597).

    transformers' ``Blip2QFormerModel`` on the queries, then a Linear to the language model's width. Every clip becomes
    `num_queries` states, however long it is. Padding is never attended to, and may hold anything. The encoder's states
    get no positions here; those of the encoders in use hold theirs.

    Args:
        input_size: Width of the encoder's states.
        hidden_size: Width of the language model's states.
        num_queries: States per clip.
        num_layers, width, num_heads: Shape of the Q-Former; its FFNs are four times as wide.
        cross_attention_frequency: Layers 0, n, 2n, ... attend to the encoder's states.
        dropout: In training, of attention weights and of each sublayer's output; BLIP-2's is 0.1.

    Raises:
        ValueError: A size is not a positive integer, heads do not divide the width, or dropout is not in [0, 1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_queries: int = 32,
        num_layers: int = 12,
        width: int = 768,
        num_heads: int = 12,
        cross_attention_frequency: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel  # takes long, and few need it

        sizes = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_queries": num_queries,
            "num_layers": num_layers,
            "width": width,
            "num_heads": num_heads,
            "cross_attention_frequency": cross_attention_frequency,
        }
        _check_positive(**sizes)
        _check_heads(num_heads, width)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {dropout!r}")
        self.config = sizes | {"dropout": dropout}
        self.input_size = input_size
        self.num_queries = num_queries
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=input_size,
        )
        # Equal queries would stay equal for ever.
        self.queries = nn.Parameter(torch.randn(1, num_queries, width) * config.initializer_range)
        self.qformer = Blip2QFormerModel(config)
        self.projection = nn.Linear(width, hidden_size)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(B, N, input_size) to (B, num_queries, hidden_size), in the weights' dtype; N at least 1. A row of length 0
        has states that mean nothing, but are finite."""
        states = _one_encoder(states, self.input_size)
        if not states.shape[1]:
            raise ValueError(f"states must hold at least one state per row, got shape {tuple(states.shape)}")
        lengths = _checked_lengths(lengths, states)
        mask = None
        if lengths is not None:
            states = states.masked_fill(~_valid(lengths, states).unsqueeze(-1), 0)
            mask = _valid(lengths.clamp(min=1), states).long()  # some kernels give NaN where nothing is seen
        outputs = self.qformer(
            query_embeds=self.queries.expand(states.shape[0], -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
        )
        projected: torch.Tensor = self.projection(outputs.last_hidden_state)
        return projected

    def connect(self, states: States, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Connector.connect`; M is num_queries, all of them valid but in rows of length 0."""
        states = _one_encoder(states, self.input_size)
        connected = self(states, lengths)
        lengths = _checked_lengths(lengths, states)
        return connected, None if lengths is None else self.output_lengths(lengths)

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """All of num_queries, none where there was nothing."""
        return (lengths > 0).long() * self.num_queries


class LfstConnector(Connector):
    """LFST, the connector of PAL (arXiv 2506.10423) that fuses SSLAM and CLAP, by the spatial aggregator of Cambrian-1
    (arXiv 2406.16860): one learnt token stands in every time-frequency cell and is updated, layer by layer,
    by cross-attention to what each encoder has at that cell.

    The cells are the first encoder's grid. Each sees the tokens of either encoder that :func:`cell_windows` finds:
    with the default grids its own SSLAM token, and the CLAP token that covers it in seconds and hertz. The result
    holds, for each time step, its cells from low to high frequency and then a learnt newline token: of the default
    grids 64 x (8 + 1) = 576 states.

    As in Cambrian-1, each encoder's states first pass Linear, GELU, Linear, LayerNorm, the mean of the first encoder's
    is what every cell is told of the whole clip, and an :class:`MlpConnector` ends in the language model's width.
    The paper does not give the sizes: the defaults are Cambrian-1's.

    Args:
        input_sizes: Width of each encoder's states, at least one; SSLAM's and CLAP's are 768.
        hidden_size: Width of the language model's states.
        grids: Each encoder's :class:`AudioGrid`, or its arguments by name.
        width, num_heads, depth: Shape of the aggregator and its number of layers.

    Raises:
        ValueError: A size is not a positive integer, heads do not divide the width, or not one grid per encoder.
    """

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
        _check_positive(**sizes, **{f"input_sizes[{i}]": size for i, size in enumerate(input_sizes)})
        _check_heads(num_heads, width)
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
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        slots = [index.shape[1] for index, _ in self.windows]
        self.layers = nn.ModuleList(AggregatorLayer(width, num_heads, slots) for _ in range(depth))
        self.projection = MlpConnector(width, hidden_size)
        self.newline = nn.Parameter(torch.randn(hidden_size) * hidden_size**-0.5)

    def forward(self, states: tuple[torch.Tensor, ...], lengths: torch.Tensor | None = None) -> torch.Tensor:
        """((B, 512, 768), (B, 64, 768)) to (B, 576, hidden_size) with the defaults, in the weights' dtype; each
        encoder's states in its grid's time-major order. Padding, beyond `lengths`, does not change what is valid."""
        encoders, lengths = self._checked(states, lengths)
        batch, (time, freq) = encoders[0].shape[0], (self.grids[0].time, self.grids[0].freq)
        padded = None
        if lengths is not None:
            padded = ~_valid(lengths, encoders[0]).unsqueeze(-1)
            encoders[0] = encoders[0].masked_fill(padded, 0)
        encoders = [project(x) for project, x in zip(self.encoder_projections, encoders, strict=True)]
        if padded is None or lengths is None:
            context = encoders[0].mean(dim=1)
        else:
            context = encoders[0].masked_fill(padded, 0).sum(dim=1) / lengths.clamp(min=1).unsqueeze(1)

        windows = [(index.to(context.device), seen.to(context.device)) for index, seen in self.windows]
        cells = self.query.expand(batch, time * freq, -1)
        for layer in self.layers:
            cells = layer(cells, context, encoders, windows)
        rows = self.projection(cells).unflatten(1, (time, freq))
        newlines = self.newline.to(rows.dtype).expand(batch, time, 1, -1)
        return torch.cat([rows, newlines], dim=2).flatten(1, 2)

    def connect(self, states: States, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`Connector.connect`. ``lengths`` are of the first encoder's states, whole time steps: multiples of
        its grid's freq (8), which become multiples of freq + 1 (9)."""
        _, checked = self._checked(states, lengths)
        return self(states, lengths), None if checked is None else self.output_lengths(checked)

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """A newline more for every time step; ``lengths`` of the first encoder's states."""
        freq = self.grids[0].freq
        return lengths.long() // freq * (freq + 1)

    def _checked(self, states: States, lengths: torch.Tensor | None) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        wanted = [("B", grid.num_tokens, size) for grid, size in zip(self.grids, self.input_sizes, strict=True)]
        if isinstance(states, torch.Tensor) or not all(isinstance(x, torch.Tensor) for x in states):
            raise TypeError(f"states must be a tuple of {len(wanted)} tensors, got {_kind(states)}")
        shapes = [tuple(x.shape) for x in states]
        if [shape[1:] for shape in shapes] != [shape[1:] for shape in wanted] or len({x[0] for x in shapes}) != 1:
            raise ValueError(f"states must have shapes {_shapes(wanted)}, got {_shapes(shapes)}")
        lengths = _checked_lengths(lengths, states[0])
        freq = self.grids[0].freq
        if lengths is not None and lengths.device.type == "cpu" and bool((lengths % freq != 0).any()):
            raise ValueError(f"lengths must be multiples of {freq}, whole time steps, got {lengths.tolist()}")
        return list(states), lengths


CONNECTORS: dict[str, type[Connector]] = {"mlp": MlpConnector, "qformer": QFormerConnector, "lfst": LfstConnector}


def _check_positive(**sizes: object) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")


def _check_heads(num_heads: int, width: int) -> None:
    if width % num_heads:
        raise ValueError(f"num_heads must divide the width {width}, got {num_heads}")


def _one_encoder(states: States, input_size: int) -> torch.Tensor:
    if not isinstance(states, torch.Tensor):
        raise TypeError(f"states must be one tensor, got {_kind(states)}")
    if states.ndim != 3 or states.shape[2] != input_size:
        raise ValueError(f"states must have shape (B, N, {input_size}), got {tuple(states.shape)}")
    return states


def _checked_lengths(lengths: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be a tensor of integers, got {_kind(lengths)}")
    if lengths.shape != states.shape[:1]:
        raise ValueError(f"lengths must have shape ({states.shape[0]},), got {tuple(lengths.shape)}")
    most = states.shape[1]
    if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > most)).any()):
        raise ValueError(f"lengths must be from 0 to {most}, got {lengths.tolist()}")
    return lengths.long()


def _valid(lengths: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """(B, N), bool."""
    return torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)


def _shapes(shapes: Sequence[tuple[object, ...]]) -> str:
    return ", ".join(f"({', '.join(map(str, shape))})" for shape in shapes)


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
