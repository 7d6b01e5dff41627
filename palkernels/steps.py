"""The steps around the matrix products of audio_kv in plain PyTorch, in float32 or float64 and rounded once.

:mod:`palkernels.kernels.projection` has the same functions as Triton kernels.
"""

import torch
from torch import Tensor


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _inverse_rms(values: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)


def normalise(rows: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """RMSNorm of rows (M, d): ``rows / rms * (weight + offset)``; without a weight, ``rows / rms``."""
    values = _upcast(rows)
    values = values * _inverse_rms(values, eps)
    if weight is not None:
        values = values * (_upcast(weight) + offset)
    return values.to(rows.dtype)


def normalise_gradient(
    dnormalised: Tensor, rows: Tensor, weight: Tensor, eps: float, offset: float, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of rows (M, d), in their dtype, and of the weight (d,), if it is wanted."""
    drows, dweight = _rms_norm_gradient(_upcast(dnormalised), _upcast(rows), _upcast(weight) + offset, eps)
    return drows.to(rows.dtype), dweight if wants_weight else None


def finish_keys(
    keys: Tensor, norm_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, offset: float
) -> None:
    """Head norm, then RoPE, of keys (A, N, Hkv, D), in place. RoPE turns the first R columns of each head."""
    values = _upcast(keys)
    if norm_weight is not None:
        values = values * _inverse_rms(values, eps) * (_upcast(norm_weight) + offset)
    if cos is not None and sin is not None:
        values = _rotate(values, _upcast(cos).unsqueeze(2), _upcast(sin).unsqueeze(2))
    keys.copy_(values)


def finish_gradient(
    dkeys: Tensor,
    raw: Tensor | None,
    norm_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the keys before :func:`finish_keys` (``raw``, needed with a head norm), contiguous, and of the
    norm's weight (D,)."""
    values, dweight = _upcast(dkeys), None
    if cos is not None and sin is not None:
        values = _rotate_back(values, _upcast(cos).unsqueeze(2), _upcast(sin).unsqueeze(2))
    if raw is not None and norm_weight is not None:
        values, dweight = _rms_norm_gradient(values, _upcast(raw), _upcast(norm_weight) + offset, eps)
    return values.to(dkeys.dtype).contiguous(), dweight


def _rms_norm_gradient(dout: Tensor, values: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse = _inverse_rms(values, eps)
    normalised = values * inverse
    dnormalised = dout * gain
    dvalues = inverse * (dnormalised - normalised * (dnormalised * normalised).mean(-1, keepdim=True))
    return dvalues, (dout * normalised).flatten(0, -2).sum(0)


def _rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = values[..., : cos.shape[-1]], values[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-high, low], dim=-1) * sin, rest], dim=-1)


def _rotate_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of :func:`_rotate`."""
    turned, rest = gradient[..., : cos.shape[-1]], gradient[..., cos.shape[-1] :]
    low, high = (turned * sin).chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([high, -low], dim=-1), rest], dim=-1)
