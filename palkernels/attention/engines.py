"""Three engines that compute attention over one set of keys, forward and backward.

PyTorch's fused CPU kernel, its memory-efficient CUDA kernel, and chunked plain PyTorch for what those cannot do:
softcap, the LSE's gradient, float64 on CUDA, other devices. In backward each is given the output and the log-sum-exp
(LSE) over *all* keys, and returns its set's exact share of the gradients.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from palkernels.attention.parts import Part, Settings

NEG_INF = float("-inf")
QUERY_CHUNK = 256  # queries whose scores the plain engine holds at once
LSE_ALIGNMENT = 32  # the CUDA kernel pads the LSE's last dimension to this
BIAS_ALIGNMENT = 16  # and wants rows of the bias to start on such a boundary (elements)


class Engine(Protocol):
    """Attention of queries (B, Hq, T, D) over one set of keys."""

    def forward(self, query: Tensor, part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, T, D) and LSE (B, Hq, T) over the part's keys alone."""

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
        """Gradients of query, and of the part's keys and values; ``out`` and ``lse`` are those over all keys."""


def choose_engine(query: Tensor, settings: Settings, lse_has_gradient: bool = False) -> Engine:
    """The fastest engine that can compute what is asked."""
    if settings.softcap is not None or lse_has_gradient:
        return _PLAIN
    if query.device.type == "cpu":
        return _CPU_FLASH
    aligned = query.shape[-1] * query.element_size() % 16 == 0
    if query.device.type == "cuda" and query.dtype != torch.float64 and aligned:
        return _CUDA_EFFICIENT
    return _PLAIN


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and LSE: float32, or float64 for float64."""
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
        folded = fold(query[:, :, rows], group)
        scores = (folded @ part.key.transpose(2, 3)).to(accumulator_dtype(query.dtype)) * settings.scale
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
        lse = query.new_empty(query.shape[:3], dtype=accumulator_dtype(query.dtype))
        group = query.shape[1] // part.key.shape[1]
        for rows in _chunks(query.shape[2]):
            _, scores, _ = self._scores(query, part, rows, settings)
            chunk_lse = torch.logsumexp(scores, dim=-1, keepdim=True)
            weights = torch.exp(scores - chunk_lse.masked_fill(chunk_lse == NEG_INF, 0))
            out[:, :, rows] = unfold(weights.to(query.dtype) @ part.value, group)
            lse[:, :, rows] = unfold(chunk_lse, group).squeeze(-1)
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
        dtype, wide = query.dtype, accumulator_dtype(query.dtype)
        group = query.shape[1] // part.key.shape[1]
        shift = (out.to(wide) * grad_out.to(wide)).sum(-1, keepdim=True)
        if grad_lse is not None:
            shift = shift - grad_lse.to(wide).unsqueeze(-1)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_key = torch.zeros_like(part.key, dtype=wide)
        grad_value = torch.zeros_like(part.value, dtype=wide)
        for rows in _chunks(query.shape[2]):
            folded, scores, tanh = self._scores(query, part, rows, settings)
            weights = torch.exp(scores - fold(lse.unsqueeze(-1)[:, :, rows], group))
            chunk_grad = fold(grad_out[:, :, rows], group)
            grad_value += weights.to(dtype).transpose(2, 3) @ chunk_grad
            grad_weights = (chunk_grad @ part.value.transpose(2, 3)).to(wide)
            grad_scores = weights * (grad_weights - fold(shift[:, :, rows], group))
            if tanh is not None:
                grad_scores = grad_scores * (1 - tanh * tanh)
            grad_scores = (grad_scores * settings.scale).to(dtype)
            grad_query[:, :, rows] = unfold(grad_scores @ part.key, group)
            grad_key += grad_scores.transpose(2, 3) @ folded
        return grad_query, grad_key.to(dtype), grad_value.to(dtype)


def _chunks(num_queries: int) -> list[slice]:
    return [slice(i, min(i + QUERY_CHUNK, num_queries)) for i in range(0, num_queries, QUERY_CHUNK)]


def fold(tensor: Tensor, group: int) -> Tensor:
    """The heads of a group as rows of one head: (B, Hkv * G, t, n) -> (B, Hkv, G * t, n)."""
    if group == 1:
        return tensor
    batch, heads, rows, columns = tensor.shape
    return tensor.reshape(batch, heads // group, group * rows, columns)


def unfold(tensor: Tensor, group: int) -> Tensor:
    """The reverse of :func:`fold`: (B, Hkv, G * t, n) -> (B, Hkv * G, t, n)."""
    if group == 1:
        return tensor
    batch, kv_heads, rows, columns = tensor.shape
    return tensor.reshape(batch, kv_heads * group, rows // group, columns)


_CPU_FLASH = _CpuFlash()
_CUDA_EFFICIENT = _CudaEfficient()
_PLAIN = _Plain()
