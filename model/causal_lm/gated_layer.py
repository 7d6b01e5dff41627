"""The layer that Flamingo puts before every n-th layer of a language model: gated cross-attention and an FFN."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from palkernels import lal_attention
from palkernels.dispatch import check_impl
from palkernels.model.causal_lm.layers import AudioKV


@dataclass(frozen=True)
class FlamingoConfig:
    """The settings of :func:`~palkernels.model.causal_lm.flamingo.attach_flamingo`, filled in from the model.

    Raises:
        ValueError: a setting is out of range.
    """

    every: int
    heads: int
    head_dim: int
    ffn_multiplier: int
    activation: str
    impl: str

    def __post_init__(self) -> None:
        for name in ("every", "heads", "head_dim", "ffn_multiplier"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.activation not in ACT2FN:
            raise ValueError(f"activation must be one that transformers knows, got {self.activation!r}")
        check_impl(self.impl)


@dataclass(frozen=True)
class AudioMask:
    """Who sees which audio, as lal_attention takes it. Query positions count from 0."""

    text_start: Tensor  # (B,) behind every query, since the text is not attended to
    audio_lengths: Tensor | None  # (A,)
    audio_index: Tensor | None  # (B,)
    audio_visible_from: Tensor | None  # (B, N)


class GatedLayer(nn.Module):
    """One new layer. With y the text's states (B, T, d), x the audio's (A, N, d):

        y = y + tanh(attention_gate) W_o softmax(scale * W_q norm(y) (W_k x)^T, masked) W_v x
        y = y + tanh(ffn_gate) FFN(norm(y))

    Norms are LayerNorms of the text; only the connector normalises the audio. A query that sees no audio keeps its
    state: attention and FFN are both left out. So a text without audio, and the text before the audio, get the stock
    model's results. (In the paper the FFN changes these queries too.) As in the paper, the layer is not told the
    positions of the audio's tokens.
    """

    def __init__(
        self,
        hidden_size: int,
        config: FlamingoConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, wide = config.heads * config.head_dim, config.ffn_multiplier * hidden_size
        self.heads, self.head_dim, self.impl = config.heads, config.head_dim, config.impl
        self.attention_norm = nn.LayerNorm(hidden_size, **factory)
        self.q_proj = nn.Linear(hidden_size, inner, bias=False, **factory)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False, **factory)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False, **factory)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False, **factory)
        self.attention_gate = nn.Parameter(torch.empty(1, **factory))
        self.ffn_norm = nn.LayerNorm(hidden_size, **factory)
        self.up_proj = nn.Linear(hidden_size, wide, bias=False, **factory)
        self.activation: nn.Module = ACT2FN[config.activation]
        self.down_proj = nn.Linear(wide, hidden_size, bias=False, **factory)
        self.ffn_gate = nn.Parameter(torch.empty(1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Close the gates, so that the model begins as the stock one."""
        init.zeros_(self.attention_gate)
        init.zeros_(self.ffn_gate)

    def audio_kv(self, states: Tensor) -> AudioKV:
        """Return K and V, both (A, H, N, D), of states (A, N, d)."""
        return self._heads(self.k_proj(states)), self._heads(self.v_proj(states))

    def forward(self, hidden: Tensor, audio_kv: AudioKV, mask: AudioMask, sees_audio: Tensor | None) -> Tensor:
        """Return the text's states (B, T, d) after this layer.

        Args:
            sees_audio: (B, T, 1), bool, of each query; None: all do.
        """
        query = self._heads(self.q_proj(self.attention_norm(hidden)))
        unseen = query.detach()  # the text's keys and values must be given, and are not seen
        attended = lal_attention(
            query,
            unseen,
            unseen,
            *audio_kv,
            audio_lengths=mask.audio_lengths,
            audio_index=mask.audio_index,
            audio_visible_from=mask.audio_visible_from,
            text_start=mask.text_start,
            impl=self.impl,
        )
        updated = hidden + self.attention_gate.tanh() * self.o_proj(attended.transpose(1, 2).flatten(2))
        wide = self.activation(self.up_proj(self.ffn_norm(updated)))
        updated = updated + self.ffn_gate.tanh() * self.down_proj(wide)
        return updated if sees_audio is None else torch.where(sees_audio, updated, hidden)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], self.heads, self.head_dim).transpose(1, 2)
