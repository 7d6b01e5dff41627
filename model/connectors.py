"""Connectors: what turns an audio encoder's states into states of the language model's width."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MlpConnector"]


class MlpConnector(nn.Module):
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
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
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
