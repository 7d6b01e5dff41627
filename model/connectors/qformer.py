"""The Q-Former: a fixed number of learnt queries gathers a clip's states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers import initialization as init

from palkernels.model.connectors.base import (
    Connector,
    States,
    check_heads,
    check_positive,
    checked_lengths,
    checked_states,
    stacked,
    start_linear_at,
    valid_mask,
)

__all__ = ["QFormerConnector"]


class QFormerConnector(Connector):
    """Learnt queries that gather a clip's states by cross-attention: the Q-Former of BLIP-2 (arXiv 2301.12597).

    transformers' ``Blip2QFormerModel`` runs on the queries, then a Linear maps to the language model's width. Every
    clip becomes ``num_queries`` states, however long it is. Padding is never attended to, and may hold anything. The
    encoder's states get no positions here: they hold those of their encoder.

    Args:
        input_size: Width of the encoder's states.
        hidden_size: Width of the language model's states.
        num_queries: States per clip.
        num_layers, width, num_heads: Shape of the Q-Former; its FFNs are four times as wide.
        cross_attention_frequency: The n of layers 0, n, 2n, ..., which attend to the encoder's states.
        dropout: Dropout of attention weights and of each sublayer's output, in training; BLIP-2 has 0.1.
        stack: How many neighbouring states are joined to one, as :func:`stacked` says, before queries attend to them.

    Raises:
        ValueError: A size is not a positive integer, the heads do not divide the width, or dropout is not in [0, 1).
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
        stack: int = 1,
    ) -> None:
        super().__init__()
        sizes = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_queries": num_queries,
            "num_layers": num_layers,
            "width": width,
            "num_heads": num_heads,
            "cross_attention_frequency": cross_attention_frequency,
            "stack": stack,
        }
        check_positive(**sizes)
        check_heads(num_heads, width)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {dropout!r}")
        self.config = sizes | {"dropout": dropout}
        self.input_size = input_size
        self.num_queries = num_queries
        self.stack = stack
        config = Blip2QFormerConfig(
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            cross_attention_frequency=cross_attention_frequency,
            encoder_hidden_size=stack * input_size,
        )
        self.initializer_range = config.initializer_range
        self.queries = nn.Parameter(torch.empty(1, num_queries, width))
        self.reset_parameters()
        self.qformer = Blip2QFormerModel(config)
        self.projection = nn.Linear(width, hidden_size)

    @property
    def attn_implementation(self) -> str | None:
        """How the Q-Former attends, by transformers' name."""
        return self.qformer.config._attn_implementation  # type: ignore[no-any-return]

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Let the Q-Former attend as transformers names it.

        Raises:
            ValueError, ImportError: It has no such implementation.
        """
        self.qformer.set_attn_implementation(attn_implementation)

    def reset_parameters(self) -> None:
        """Draw the queries: equal ones would stay equal for ever."""
        init.normal_(self.queries, std=self.initializer_range)

    def forward(self, states: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map (B, N, input_size), N at least 1, to (B, num_queries, hidden_size), in the weights' dtype.

        A clip of length 0 gets states that mean nothing, but are finite.
        """
        states = checked_states(states, self.input_size)
        if not states.shape[1]:
            raise ValueError(f"states must hold at least one state per clip, got shape {tuple(states.shape)}")
        states, lengths = stacked(states, checked_lengths(lengths, states), self.stack)
        mask = None
        if lengths is not None:
            states = states.masked_fill(~valid_mask(lengths, states).unsqueeze(-1), 0)
            mask = valid_mask(lengths.clamp(min=1), states).long()  # some kernels give NaN where nothing is seen
        outputs = self.qformer(
            query_embeds=self.queries.expand(states.shape[0], -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
        )
        projected: Tensor = self.projection(outputs.last_hidden_state)
        return projected

    def connect(self, states: States, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Connect as :meth:`Connector.connect` says; M is num_queries, all of them valid except for empty clips."""
        states = checked_states(states, self.input_size)
        connected = self(states, lengths)
        lengths = checked_lengths(lengths, states)
        return connected, None if lengths is None else self.output_lengths(lengths)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return num_queries for every clip, and 0 for an empty one."""
        return (lengths > 0).long() * self.num_queries

    def start_at(self, direction: Tensor) -> None:
        start_linear_at(self.projection, direction)
