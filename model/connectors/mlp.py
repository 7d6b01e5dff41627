"""The two-layer MLP between an encoder and a language model."""

from __future__ import annotations

from torch import Tensor, nn

from palkernels.model.connectors.base import Connector, States, check_positive, checked_lengths, checked_states

__all__ = ["MlpConnector"]


class MlpConnector(Connector):
    """Linear, GELU, Linear: the two-layer MLP that LLaVA-1.5 and models like it put before their LLM.

    It maps (..., input_size) to (..., hidden_size) and treats every position alike, so it changes neither the
    number of audio tokens nor their order. The hidden layer is as wide as the output. GELU is exact, not its tanh form.

    Args:
        input_size: Width of the encoder's states.
        hidden_size: Width of the language model's states.

    Raises:
        ValueError: A size is not a positive integer, or an input's last dimension is not `input_size`.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.config = {"input_size": input_size, "hidden_size": hidden_size}
        check_positive(**self.config)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.linear_1 = nn.Linear(input_size, hidden_size)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., input_size) to (..., hidden_size), in the weights' dtype."""
        if states.shape[-1:] != (self.input_size,):
            raise ValueError(f"states must have shape (..., {self.input_size}), got {tuple(states.shape)}")
        output: Tensor = self.linear_2(self.activation(self.linear_1(states)))
        return output

    def connect(self, states: States, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Connect as :meth:`Connector.connect` says; M is N, and lengths stay as they are."""
        states = checked_states(states, self.input_size)
        return self(states), checked_lengths(lengths, states)
