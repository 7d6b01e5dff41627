"""The two-layer MLP between an encoder and a language model."""

from __future__ import annotations

from torch import Tensor, nn

from palkernels.model.connectors.base import (
    Connector,
    States,
    check_positive,
    checked_lengths,
    checked_states,
    stacked,
    stacked_lengths,
    start_linear_at,
)

__all__ = ["MlpConnector"]


class MlpConnector(Connector):
    """Linear, GELU, Linear: the two-layer MLP that LLaVA-1.5 and models like it put before their LLM.

    It maps (..., stack * input_size) to (..., hidden_size) and treats every position alike, so it changes neither the
    number of audio tokens nor their order. :meth:`connect` joins ``stack`` neighbouring states of a clip to one before.
    The hidden layer is as wide as the output. GELU is exact, not its tanh form.

    Args:
        input_size: Width of the encoder's states.
        hidden_size: Width of the language model's states.
        stack: How many neighbouring states become one, as :func:`stacked` says: 1 leaves them as they are.

    Raises:
        ValueError: A size is not a positive integer, or an input's last dimension is not `stack * input_size`.
    """

    def __init__(self, input_size: int, hidden_size: int, stack: int = 1) -> None:
        super().__init__()
        self.config = {"input_size": input_size, "hidden_size": hidden_size, "stack": stack}
        check_positive(**self.config)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.stack = stack
        self.linear_1 = nn.Linear(stack * input_size, hidden_size)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., stack * input_size) to (..., hidden_size), in the weights' dtype."""
        width = self.linear_1.in_features
        if states.shape[-1:] != (width,):
            raise ValueError(f"states must have shape (..., {width}), got {tuple(states.shape)}")
        output: Tensor = self.linear_2(self.activation(self.linear_1(states)))
        return output

    def connect(self, states: States, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Connect as :meth:`Connector.connect` says; M is ceil(N / stack), and so are lengths."""
        states = checked_states(states, self.input_size)
        joined, lengths = stacked(states, checked_lengths(lengths, states), self.stack)
        return self(joined), lengths

    def start_at(self, direction: Tensor) -> None:
        start_linear_at(self.linear_2, direction)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return ceil(length / stack)."""
        return stacked_lengths(lengths, self.stack)
