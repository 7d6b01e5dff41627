"""Packed texts: B of them in one row, one after another, without padding, as padding-free collators make them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palkernels.model.causal_lm.facts import DeviceFacts


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each text of a packed row lies."""

    cu_seqlens: Tensor  # (B + 1,) the first token of each text, and the number of all
    text_of: Tensor  # (T,) the text of each token
    text_index: Tensor  # (T,) its place in it
    longest: int  # tokens of the longest text

    @classmethod
    def of(cls, facts: DeviceFacts, position_ids: Tensor, count: int) -> "Packing":
        """Return where ``count`` texts lie, by positions (1, T) that restart at 0; ``longest`` is still to be read.

        Asks how many texts there are, whether positions count each from 0, and for the longest.
        """
        positions = position_ids[0]
        is_first = positions == 0
        starts = is_first.int().argsort(descending=True, stable=True)[:count]
        text_of = (is_first.cumsum(0) - 1).clamp(0, count - 1)
        steps = torch.arange(positions.shape[0], device=positions.device)
        text_index = steps - starts[text_of]
        cu_seqlens = torch.cat([starts, starts.new_full((1,), positions.shape[0])])
        packing = cls(cu_seqlens, text_of, text_index, longest=positions.shape[0])
        facts.ask("packed texts", is_first.sum())
        facts.ask("packed positions differ", (positions != text_index).any())
        facts.ask("longest", packing.lengths.max())
        return packing

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, (B,)."""
        return self.cu_seqlens.diff()

    def with_longest(self, longest: int) -> "Packing":
        """Return it with the length of the longest text, once that has been read."""
        return replace(self, longest=longest)

    def padded_index(self) -> Tensor:
        """Return the places (B, longest) in each text, as if all were of one length."""
        steps = torch.arange(self.longest, device=self.cu_seqlens.device)
        return steps.expand(self.cu_seqlens.shape[0] - 1, -1)

    def packed(self, per_text: Tensor) -> Tensor:
        """Return (1, T) of each token, from (B, longest) as :meth:`padded_index` counts."""
        return per_text[self.text_of, self.text_index].unsqueeze(0)
