"""The portable path: attention over the audio and over the text, merged by their log-sum-exp (LSE).

Attention over two sets of keys is the average of the attention over each, weighted by ``exp(lse_set - lse)`` with
``lse = logaddexp(lse_audio, lse_text)``; so nothing is concatenated. Backward needs no gradient of that merge: a
flash-attention backward rebuilds its probabilities as ``exp(score - lse)``, and handed the *merged* output and LSE
it returns each set's exact share of the gradients.

Three engines compute one set: PyTorch's fused CPU kernel, its memory-efficient CUDA kernel, and chunked plain
PyTorch for what those cannot do (softcap, the LSE's gradient, float64 on CUDA, other devices).
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from palkernels.attention.call import INTEGERS

NEG_INF = float("-inf")
QUERY_CHUNK = 256  # queries whose scores the plain engine holds at once
LSE_ALIGNMENT = 32  # the CUDA kernel pads the LSE's last dimension to this
BIAS_ALIGNMENT = 16  # and wants rows of the bias to start on such a boundary (elements)
LEAST_CAUSAL_SCALE = 1e-30  # PyTorch's fused kernels hide keys by -inf before they scale: NaN for 0, seen below 0


@dataclass(frozen=True)
class Settings:
    """What the masks and scores depend on, besides q, k and v. Tensors hold integers, one row per text row."""

    scale: float
    softcap: float | None
    window: int | None
    audio_lengths: Tensor | None
    audio_index: Tensor | None
    audio_visible_from: Tensor | None
    text_start: Tensor | None
    text_end: Tensor | None

    def with_integers(self, tensors: dict[str, Tensor | None]) -> "Settings":
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part:
    """One set of keys. ``mask`` is bool (B or 1, 1, T or 1, keys), None where every query sees every key;
    ``causal`` stands for the lower triangle of a square mask."""

    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool = False


class Engine(Protocol):
    def forward(self, query: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        part: Part,
        out: Tensor,
        lse: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def lal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """:func:`palkernels.lal_attention` on validated inputs; returns ``(out, lse)``."""
    # PyTorch's fused kernels read the last dimension as if its stride were 1.
    query, key, value, audio_key, audio_value = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (query, key, value, audio_key, audio_value)
    )
    out, lse = _MergedAttention.apply(query, key, value, audio_key, audio_value, settings)  # type: ignore[no-untyped-call]
    return out, lse


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
            seen_query, parts = _split(query, key, value, audio_key, audio_value, settings)
            engine = _engine(query, settings)
            out, lse = _merge([_attend(engine, seen_query, part, settings) for part in parts], parts)
        else:
            out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=_accumulator(query.dtype))
        # (B, T, Hq, D) in memory, so that the transpose Hugging Face does next is free.
        out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        integers = (getattr(settings, name) for name in INTEGERS)
        ctx.save_for_backward(query, key, value, audio_key, audio_value, out, lse, *integers)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        query, key, value, audio_key, audio_value, out, lse, *integers = ctx.saved_tensors
        settings: Settings = ctx.settings.with_integers(dict(zip(INTEGERS, integers, strict=True)))
        if grad_out is None and grad_lse is None:
            return (None,) * 6
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if not out.numel():
            return (*(torch.zeros_like(x) for x in (query, key, value, audio_key, audio_value)), None)

        query, parts = _split(query, key, value, audio_key, audio_value, settings)
        # exp(-inf - 0) is 0, where exp(-inf - -inf) would be NaN: a blind query's probabilities.
        lse = lse.masked_fill(lse == NEG_INF, 0)
        engine = _PLAIN if grad_lse is not None else _engine(query, settings)
        shares = [_attend_backward(engine, grad_out, grad_lse, query, part, out, lse, settings) for part in parts]

        grad_query = shares[-1][0]
        for grad, _, _ in shares[:-1]:
            grad_query = grad_query + grad
        _, grad_key, grad_value = shares[-1]
        if len(shares) == 1:
            return (
                grad_query,
                grad_key,
                grad_value,
                torch.zeros_like(audio_key),
                torch.zeros_like(audio_value),
                None,
            )
        _, grad_audio_key, grad_audio_value = shares[0]
        grad_audio_key = _sum_shared(grad_audio_key, audio_key, settings.audio_index)
        grad_audio_value = _sum_shared(grad_audio_value, audio_value, settings.audio_index)
        return grad_query, grad_key, grad_value, grad_audio_key, grad_audio_value, None


def _split(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, settings: Settings
) -> tuple[Tensor, list[Part]]:
    """Masks for the audio (if there is any) and the text; and what no query sees, which may hold NaN, zeroed."""
    num_audio = audio_key.shape[2]
    text_mask, causal = _text_mask(query, key, settings)
    parts = [Part(*_zero_unseen(key, value, text_mask), text_mask, causal)]
    if num_audio:
        audio_mask = _audio_mask(query, key, num_audio, settings)
        shared = settings.audio_index
        audio_key, audio_value = _rows(audio_key, shared), _rows(audio_value, shared)
        parts.insert(0, Part(*_zero_unseen(audio_key, audio_value, audio_mask), audio_mask))
    masks = [part.mask for part in parts]
    if not causal and all(mask is not None for mask in masks):
        rows = (query.shape[0], 1, query.shape[2])
        blind = torch.stack([(~mask).all(dim=-1).expand(rows) for mask in masks if mask is not None])
        query = query.masked_fill(blind.all(dim=0).unsqueeze(-1), 0)
    return query, parts


def _positions(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """Key position of each query, int64 (B or 1, 1, T, 1)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    offset: Tensor | int = num_keys - num_queries
    if settings.text_end is not None:
        offset = settings.text_end.to(torch.int64).view(-1, 1, 1, 1) - num_queries
    return offset + torch.arange(num_queries, device=query.device).view(1, 1, -1, 1)


def _text_mask(query: Tensor, key: Tensor, settings: Settings) -> tuple[Tensor | None, bool]:
    num_queries, num_keys = query.shape[2], key.shape[2]
    if settings.text_start is None and settings.text_end is None and settings.window is None:
        if num_queries == 1:
            return None, False
        if num_queries == num_keys and settings.scale >= LEAST_CAUSAL_SCALE:
            return None, True
    position = _positions(query, key, settings)
    index = torch.arange(num_keys, device=query.device)
    mask = index <= position
    if settings.text_start is not None:
        mask = mask & (index >= settings.text_start.view(-1, 1, 1, 1))
    if settings.window is not None:
        mask = mask & (index > position - settings.window)
    return mask, False


def _audio_mask(query: Tensor, key: Tensor, num_audio: int, settings: Settings) -> Tensor | None:
    mask = None
    if settings.audio_lengths is not None:
        lengths = _rows(settings.audio_lengths, settings.audio_index).view(-1, 1, 1, 1)
        mask = torch.arange(num_audio, device=query.device) < lengths
    if settings.audio_visible_from is not None:
        visible = settings.audio_visible_from[:, None, None, :] <= _positions(query, key, settings)
        mask = visible if mask is None else mask & visible
    return mask


def _zero_unseen(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        return key, value
    unseen = ~mask.any(dim=2).unsqueeze(-1)
    return key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)


def _rows(tensor: Tensor, index: Tensor | None) -> Tensor:
    """Rows of the shared tensor for each text row; one shared row is expanded without a copy."""
    if index is None:
        return tensor
    if tensor.shape[0] == 1:
        return tensor.expand(index.shape[0], *tensor.shape[1:])
    return tensor.index_select(0, index)


def _sum_shared(grad: Tensor, tensor: Tensor, index: Tensor | None) -> Tensor:
    """The reverse of :func:`_rows`."""
    if index is None:
        return grad
    if tensor.shape[0] == 1:
        return grad.sum(dim=0, keepdim=True)
    return torch.zeros_like(tensor).index_add_(0, index, grad)


def _merge(results: list[tuple[Tensor, Tensor]], parts: list[Part]) -> tuple[Tensor, Tensor]:
    """The merged output and LSE. What an engine gives for a query that sees none of its keys is ignored."""
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


def _engine(query: Tensor, settings: Settings) -> Engine:
    if settings.softcap is not None:
        return _PLAIN
    if query.device.type == "cpu":
        return _CPU_FLASH
    aligned = query.shape[-1] * query.element_size() % 16 == 0
    if query.device.type == "cuda" and query.dtype != torch.float64 and aligned:
        return _CUDA_EFFICIENT
    return _PLAIN


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _additive(mask: Tensor | None, query: Tensor, alignment: int = 1) -> Tensor | None:
    """The mask as 0 and -inf, (B or 1, 1, T, keys) in query's dtype; rows start on multiples of ``alignment``."""
    if mask is None:
        return None
    num_keys = mask.shape[-1]
    padded = pad(mask, (0, -num_keys % alignment))
    bias = torch.zeros(padded.shape, dtype=query.dtype, device=mask.device).masked_fill_(~padded, NEG_INF)
    return bias[..., :num_keys].expand(-1, -1, query.shape[2], -1)


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor whose rows start on 16-byte boundaries; rows of the right length are known to be there."""
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    fits = tensor.stride(-1) == 1 and tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor if fits and all(step % 16 == 0 for step in steps) else tensor.contiguous()


def _folded_group(query: Tensor, part: Part) -> int:
    """Where no query depends on its place (no causality, one mask for all), the heads of a group become rows of one
    head, so that their keys are read once: how many heads fold, 1 where none may."""
    one_mask = part.mask is None or part.mask.shape[2] == 1
    return query.shape[1] // part.key.shape[1] if one_mask and not part.causal else 1


def _attend(engine: Engine, query: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
    """Output and LSE over one part, (B, Hq, T, D) and (B, Hq, T)."""
    group = _folded_group(query, part)
    out, lse = engine.forward(_fold(query, group), part, settings)
    return _unfold(out, group), _unfold(lse.unsqueeze(-1), group).squeeze(-1)


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
    grad_out, query, out = (_fold(tensor, group) for tensor in (grad_out, query, out))
    lse = _fold(lse.unsqueeze(-1), group).squeeze(-1)
    if grad_lse is not None:
        grad_lse = _fold(grad_lse.unsqueeze(-1), group).squeeze(-1)
    grad_query, grad_key, grad_value = engine.backward(grad_out, grad_lse, query, part, out, lse, settings)
    return _unfold(grad_query, group), grad_key, grad_value


class _CpuFlash:
    """PyTorch's fused CPU kernel: grouped heads, any float dtype."""

    def forward(self, query: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            part.key,
            part.value,
            0.0,
            part.causal,
            attn_mask=_additive(part.mask, query),
            scale=settings.scale,
        )
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        part: Part,
        out: Tensor,
        lse: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert grad_lse is None
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out,
            query,
            part.key,
            part.value,
            out,
            lse,
            0.0,
            part.causal,
            attn_mask=_additive(part.mask, query),
            scale=settings.scale,
        )
        return grad_query, grad_key, grad_value


class _CudaEfficient:
    """PyTorch's memory-efficient CUDA kernel. It knows no grouped heads, so K and V are expanded meanwhile, and takes
    rows that start on 16-byte boundaries."""

    def _inputs(self, query: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        group = query.shape[1] // part.key.shape[1]
        key, value = part.key, part.value
        if group > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        query, key, value = (_aligned(tensor) for tensor in (query, key, value))
        bias = _additive(part.mask, query, alignment=BIAS_ALIGNMENT)
        return query, key, value, None if bias is None else bias.expand(*query.shape[:2], -1, -1)

    def forward(self, query: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
        query, key, value, bias = self._inputs(query, part)
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, part.causal, scale=settings.scale
        )
        return out, lse[:, :, : query.shape[2]]

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        part: Part,
        out: Tensor,
        lse: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert grad_lse is None
        query, key, value, bias = self._inputs(query, part)
        no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
        grad_query, grad_key, grad_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            _aligned(grad_out),
            query,
            key,
            value,
            bias,
            # The kernel takes no strides of this one: it reads it as (B, T, H, D).
            out.transpose(1, 2).contiguous().transpose(1, 2),
            # Rows that do not exist get probability exp(-inf) = 0, as the kernel's own forward pads.
            pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=float("inf")),
            no_dropout,
            no_dropout,
            0.0,
            [True, True, True, False],
            part.causal,
            scale=settings.scale,
        )
        batch, kv_heads, num_keys, head_dim = part.key.shape
        grouped = (batch, kv_heads, -1, num_keys, head_dim)
        return grad_query, grad_key.reshape(grouped).sum(2), grad_value.reshape(grouped).sum(2)


class _Plain:
    """Matrix products over chunks of queries; the heads of a group fold into the rows, so K and V stay as they are.

    With z the scaled scores and dz their gradient: dz = p * (dp - rowsum(out * dout) + dlse); a softcap multiplies
    dz by 1 - tanh(z / softcap)^2 (FlashAttention-2, arXiv 2307.08691, and the derivative of the LSE).
    """

    def _scores(
        self, query: Tensor, part: Part, rows: slice, settings: Settings
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Folded queries (B, Hkv, G * t, D), masked scores (B, Hkv, G * t, keys), and tanh's value if capped."""
        group = query.shape[1] // part.key.shape[1]
        folded = _fold(query[:, :, rows], group)
        scores = (folded @ part.key.transpose(2, 3)).to(_accumulator(query.dtype)) * settings.scale
        tanh = None
        if settings.softcap is not None:
            tanh = torch.tanh(scores / settings.softcap)
            scores = settings.softcap * tanh
        mask = part.mask
        if part.causal:
            mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        if mask is not None:
            seen = mask.expand(-1, -1, query.shape[2], -1)[:, :, rows]
            scores = scores.masked_fill(~seen.repeat(1, 1, group, 1), NEG_INF)
        return folded, scores, tanh

    def forward(self, query: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:3], dtype=_accumulator(query.dtype))
        group = query.shape[1] // part.key.shape[1]
        for rows in _chunks(query.shape[2]):
            _, scores, _ = self._scores(query, part, rows, settings)
            chunk_lse = torch.logsumexp(scores, dim=-1, keepdim=True)
            weights = torch.exp(scores - chunk_lse.masked_fill(chunk_lse == NEG_INF, 0))
            out[:, :, rows] = _unfold(weights.to(query.dtype) @ part.value, group)
            lse[:, :, rows] = _unfold(chunk_lse, group).squeeze(-1)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        part: Part,
        out: Tensor,
        lse: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, wide = query.dtype, _accumulator(query.dtype)
        group = query.shape[1] // part.key.shape[1]
        shift = (out.to(wide) * grad_out.to(wide)).sum(-1, keepdim=True)
        if grad_lse is not None:
            shift = shift - grad_lse.to(wide).unsqueeze(-1)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key = torch.zeros_like(part.key, dtype=wide)
        grad_value = torch.zeros_like(part.value, dtype=wide)
        for rows in _chunks(query.shape[2]):
            folded, scores, tanh = self._scores(query, part, rows, settings)
            weights = torch.exp(scores - _fold(lse.unsqueeze(-1)[:, :, rows], group))
            chunk_grad = _fold(grad_out[:, :, rows], group)
            grad_value += weights.to(dtype).transpose(2, 3) @ chunk_grad
            grad_weights = (chunk_grad @ part.value.transpose(2, 3)).to(wide)
            grad_scores = weights * (grad_weights - _fold(shift[:, :, rows], group))
            if tanh is not None:
                grad_scores = grad_scores * (1 - tanh * tanh)
            grad_scores = (grad_scores * settings.scale).to(dtype)
            grad_query[:, :, rows] = _unfold(grad_scores @ part.key, group)
            grad_key += grad_scores.transpose(2, 3) @ folded
        return grad_query, grad_key.to(dtype), grad_value.to(dtype)


def _chunks(num_queries: int) -> list[slice]:
    return [slice(i, min(i + QUERY_CHUNK, num_queries)) for i in range(0, num_queries, QUERY_CHUNK)]


def _fold(tensor: Tensor, group: int) -> Tensor:
    """(B, Hkv * G, t, n) -> (B, Hkv, G * t, n)"""
    if group == 1:
        return tensor
    batch, heads, rows, columns = tensor.shape
    return tensor.reshape(batch, heads // group, group * rows, columns)


def _unfold(tensor: Tensor, group: int) -> Tensor:
    """(B, Hkv, G * t, n) -> (B, Hkv * G, t, n)"""
    if group == 1:
        return tensor
    batch, kv_heads, rows, columns = tensor.shape
    return tensor.reshape(batch, kv_heads * group, rows // group, columns)


_CPU_FLASH = _CpuFlash()
_CUDA_EFFICIENT = _CudaEfficient()
_PLAIN = _Plain()
