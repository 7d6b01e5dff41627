"""Audio rows of very different lengths: what is valid of them, as one row without padding, for the layers' projections.

A layer's norm, projections and RoPE take each token by itself, so padding is left out before them and put back behind.
Attention passes over padding anyway.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palkernels.model.causal_lm.layers import AudioKV, Rotation

# Packing pays where it saves more than this share of the tokens: it copies keys and values once more.
LEAST_SAVING = 0.25


@dataclass(frozen=True, eq=False)
class ValidTokens:
    """The M valid tokens of audio rows (A, N)."""

    place: Tensor  # (M,) of each among the A * N tokens
    rows: int  # A
    tokens: int  # N

    @classmethod
    def of(cls, lengths: Tensor, tokens: int, count: int) -> "ValidTokens | None":
        """Return the valid tokens of rows, or None where leaving out the others does not pay.

        Args:
            lengths: (A,) valid tokens of each row, which come first.
            tokens: N.
            count: M, the sum of the lengths, as the host knows it.
        """
        rows = lengths.shape[0]
        if count >= (1 - LEAST_SAVING) * rows * tokens:
            return None
        valid = torch.arange(tokens, device=lengths.device) < lengths.unsqueeze(1)
        # The first ``count`` of a stable sort, not nonzero, which would wait for the device.
        order = valid.flatten().logical_not().byte().argsort(stable=True)
        return cls(order[: max(count, 1)], rows, tokens)

    def pack(self, states: Tensor) -> Tensor:
        """Return states (A, N, d) as (1, M, d)."""
        return states.flatten(0, 1).index_select(0, self.place).unsqueeze(0)

    def pack_rotation(self, rotation: Rotation) -> Rotation:
        """Return cos and sin (A or 1, N, R) as (1, M, R)."""
        shared = rotation[0].shape[0] == 1
        place = self.place % self.tokens if shared else self.place
        cos, sin = (table.flatten(0, 1).index_select(0, place).unsqueeze(0) for table in rotation)
        return cos, sin

    def unpack(self, packed: AudioKV) -> AudioKV:
        """Return K and V (1, H, M, D) as (A, H, N, D), zero where there is padding."""
        key, value = (self._unpacked(tensor[0].transpose(0, 1)) for tensor in packed)
        return key, value

    def _unpacked(self, tokens: Tensor) -> Tensor:
        padded = tokens.new_zeros(self.rows * self.tokens, *tokens.shape[1:]).index_copy(0, self.place, tokens)
        return padded.view(self.rows, self.tokens, *tokens.shape[1:]).transpose(1, 2)
