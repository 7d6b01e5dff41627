"""What an attached model runs when it is given audio, layer by layer, and why not something faster."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from palkernels import devices, unsupported_reasons
from palkernels.dispatch import choose
from palkernels.dtypes import EIGHT_BITS
from palkernels.model.causal_lm.config import LalConfig
from palkernels.model.causal_lm.layers import num_kv_heads
from palkernels.model.causal_lm.support import devices_of


@dataclass(frozen=True)
class LayerReport:
    """What one layer runs when the model is given audio."""

    layer: int
    audio: bool  # whether the layer sees audio
    # The implementation, with ``audio_kv_dtype`` that of ``generate``; "stock" where the layer sees no audio, "none"
    # where it would raise.
    impl: str
    why_not_triton: tuple[str, ...]  # empty where triton runs
    why_not_fused: str | None  # None where audio_kv can project the audio

    @property
    def audio_kv(self) -> str:
        """What projects audio: "fused" (audio_kv; under autocast or torch.compile the modules), "modules" (the layer's
        own), or "none" where the layer sees no audio."""
        if not self.audio:
            return "none"
        return "modules" if self.why_not_fused else "fused"


@dataclass(frozen=True)
class LalReport:
    """What :meth:`LalHandle.report` returns; ``str`` of it is a table."""

    model: str
    rope: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}, rope={self.rope!r}", "layer  audio  implementation  audio_kv"]
        lines += [f"{x.layer:5}  {'yes' if x.audio else 'no':5}  {x.impl:14}  {x.audio_kv}" for x in self.layers]
        reasons = dict.fromkeys(reason for layer in self.layers for reason in layer.why_not_triton)
        lines += [f"triton does not run: {reason}" for reason in reasons]
        unfused = dict.fromkeys(layer.why_not_fused for layer in self.layers if layer.why_not_fused)
        lines += [f"audio_kv is not fused: {reason}" for reason in unfused]
        return "\n".join(lines)


def make_report(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    selected: Sequence[int],
    config: LalConfig,
    why_not_fused: str | None,
) -> LalReport:
    """Report on every layer of a model; ``selected`` are those that see audio."""
    reports = []
    for index, layer in enumerate(layers):
        if index in selected:
            attention: Any = layer.self_attn
            heads = attention.config.num_attention_heads, num_kv_heads(attention), attention.head_dim
            in_eight_bits = config.audio_kv_dtype is not None
            device = next(devices_of(attention))
            impl, reasons = implementation(*heads, model.dtype, device, config.impl, in_eight_bits)
            reports.append(LayerReport(index, True, impl, tuple(reasons), why_not_fused))
        else:
            reports.append(LayerReport(index, False, "stock", (), None))
    return LalReport(type(model).__name__, config.rope, tuple(reports))


def implementation(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    impl: str,
    in_eight_bits: bool = False,
) -> tuple[str, list[str]]:
    """Return the implementation that attends in a layer of this shape, and why Triton does not.

    It is "none" where the layer would raise. ``in_eight_bits``: to audio that ``generate`` keeps so.
    """
    query = torch.empty(1, num_heads, 1, head_dim, dtype=dtype, device=device)
    key = query[:, :num_kv_heads]
    audio, scale = key, None
    if in_eight_bits:
        audio, scale = key.to(EIGHT_BITS), torch.ones(1, num_kv_heads, device=device)
    reasons = unsupported_reasons(
        query, key, key, audio, audio, audio_key_scale=scale, audio_value_scale=scale, impl="triton"
    )
    raises = impl == "triton" and bool(reasons)
    return "none" if raises else choose(impl, reasons, on_cuda=devices.runs_kernels(query.device)), reasons
