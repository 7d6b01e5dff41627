"""The portable path: attention over the audio and over the text, merged by their log-sum-exp (LSE).

Attention over two sets of keys is the average of the attention over each, weighted by ``exp(lse_set - lse)`` with
``lse = logaddexp(lse_audio, lse_text)``; so nothing is concatenated. Backward needs no gradient of that merge: a
flash-attention backward rebuilds its probabilities as ``exp(score - lse)``, and handed the *merged* output and LSE
it returns each set's exact share of the gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palkernels.arguments import INTEGERS
from palkernels.attention.engines import NEG_INF, Engine, accumulator_dtype, choose_engine, fold, unfold
from palkernels.attention.parts import Part, Settings, split, sum_shared
from palkernels.operators import final


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of :func:`palkernels.lal_attention` on validated inputs, integers as int32 or int64."""
    # PyTorch's fused kernels read the last dimension as if its stride were 1.
    query, key, value, audio_key, audio_value = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (query, key, value, audio_key, audio_value)
    )
    out, lse = _MergedAttention.apply(*_distinct(query, key, value, audio_key, audio_value), settings)
    return out, lse


def _distinct(*tensors: Tensor) -> list[Tensor]:
    """The tensors; one that was there before as a view: torch.compile traces no autograd.Function with it twice."""
    distinct: list[Tensor] = []
    for tensor in tensors:
        distinct.append(tensor.view_as(tensor) if any(tensor is other for other in distinct) else tensor)
    return distinct


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        audio_key: Tensor,
        audio_value: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # The tensors among them are saved as such, so that one changed before backward raises.
        ctx.settings = settings.with_integers(dict.fromkeys(INTEGERS))
        if query.numel():
            seen_query, parts = split(query, key, value, audio_key, audio_value, settings)
            engine = choose_engine(query, settings)
            out, lse = _merge([_attend(engine, seen_query, part, settings) for part in parts], parts)
        else:
            out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=accumulator_dtype(query.dtype))
        # (B, T, Hq, D) in memory, so that the transpose Hugging Face does next is free.
        out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        integers = (getattr(settings, name) for name in INTEGERS)
        ctx.save_for_backward(query, key, value, audio_key, audio_value, out, lse, *integers)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        floats, (out, lse) = saved[:5], saved[5:7]
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if out.numel():
            settings: Settings = ctx.settings.with_integers(dict(zip(INTEGERS, saved[-len(INTEGERS) :], strict=True)))
            with torch.no_grad():
                gradients = _gradients(floats, out, lse, grad_out, grad_lse, settings)
        else:
            gradients = tuple(torch.zeros_like(x) for x in floats)
        return *final(gradients, (*saved, grad_out, grad_lse)), None


def _gradients(
    floats: Sequence[Tensor], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, settings: Settings
) -> tuple[Tensor, ...]:
    """Gradients of the five float tensors."""
    query, key, value, audio_key, audio_value = floats
    query, parts = split(query, key, value, audio_key, audio_value, settings)
    # exp(-inf - 0) is 0, where exp(-inf - -inf) would be NaN: a blind query's probabilities.
    lse = lse.masked_fill(lse == NEG_INF, 0)
    engine = choose_engine(query, settings, lse_has_gradient=grad_lse is not None)
    shares = [_attend_backward(engine, grad_out, grad_lse, query, part, out, lse, settings) for part in parts]

    grad_query = shares[-1][0]
    for grad, _, _ in shares[:-1]:
        grad_query = grad_query + grad
    _, grad_key, grad_value = shares[-1]
    if len(shares) == 1:
        return grad_query, grad_key, grad_value, torch.zeros_like(audio_key), torch.zeros_like(audio_value)
    _, grad_audio_key, grad_audio_value = shares[0]
    grad_audio_key = sum_shared(grad_audio_key, audio_key, settings.audio_index)
    grad_audio_value = sum_shared(grad_audio_value, audio_value, settings.audio_index)
    return grad_query, grad_key, grad_value, grad_audio_key, grad_audio_value


def _merge(results: list[tuple[Tensor, Tensor]], parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Output and LSE over all keys. What an engine gives for a query that sees none of its keys is ignored."""
    outs, lses = [], []
    for (part_out, part_lse), part in zip(results, parts, strict=True):
        if part.mask is not None:
            blind = (~part.mask).all(dim=-1)
            part_lse = part_lse.masked_fill(blind, NEG_INF)
            part_out = part_out.masked_fill(blind.unsqueeze(-1), 0)
        outs.append(part_out)
        lses.append(part_lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    lse = torch.logaddexp(lses[0], lses[1])
    finite = lse.masked_fill(lse == NEG_INF, 0)
    audio_weight, text_weight = (torch.exp(part_lse - finite).unsqueeze(-1) for part_lse in lses)
    return audio_weight * outs[0] + text_weight * outs[1], lse


def _folded_group(query: Tensor, part: Part) -> int:
    """How many query heads become rows of one head, so that their keys are read once; 1: none.

    A group's heads may where all queries see the same keys: no causality, one mask for all.
    """
    one_mask = part.mask is None or part.mask.shape[2] == 1
    return query.shape[1] // part.key.shape[1] if one_mask and not part.causal else 1


def _attend(engine: Engine, query: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
    """Output and LSE over one part, (B, Hq, T, D) and (B, Hq, T)."""
    group = _folded_group(query, part)
    out, lse = engine.forward(fold(query, group), part, settings)
    return unfold(out, group), unfold(lse.unsqueeze(-1), group).squeeze(-1)


def _attend_backward(
    engine: Engine,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    part: Part,
    out: Tensor,
    lse: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """One part's gradients of query, key and value, given the merged output and LSE."""
    group = _folded_group(query, part)
    grad_out, query, out = (fold(tensor, group) for tensor in (grad_out, query, out))
    lse = fold(lse.unsqueeze(-1), group).squeeze(-1)
    if grad_lse is not None:
        grad_lse = fold(grad_lse.unsqueeze(-1), group).squeeze(-1)
    grad_query, grad_key, grad_value = engine.backward(grad_out, grad_lse, query, part, out, lse, settings)
    return unfold(grad_query, group), grad_key, grad_value
