"""The steps around the matrix products of audio_kv in plain PyTorch, in float32 or float64 and rounded once.

:mod:`palkernels.kernels.projection` has the same functions as Triton kernels.
"""

import torch
from torch import Tensor

from palkernels.arguments import Projection


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _inverse_rms(values: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)


def normalise(layer: Projection, weight: Tensor | None) -> Tensor:
    """RMSNorm of the layer's rows (M, d): ``rows / rms * (weight + norm_offset)``; without a weight, ``rows / rms``."""
    values = _upcast(layer.flat_states)
    values = values * _inverse_rms(values, layer.eps)
    if weight is not None:
        values = values * (_upcast(weight) + layer.norm_offset)
    return values.to(layer.states.dtype)


def normalise_gradient(dnormalised: Tensor, layer: Projection, wants_weight: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of the rows (M, d), in their dtype, and of the norm's weight (d,), if it is wanted."""
    gain = _upcast(layer.norm_weight) + layer.norm_offset
    drows, dweight = _rms_norm_gradient(_upcast(dnormalised), _upcast(layer.flat_states), gain, layer.eps)
    return drows.to(layer.states.dtype), dweight if wants_weight else None


def finish_keys(keys: Tensor, layer: Projection) -> None:
    """Head norm, then RoPE, of keys (A, N, Hkv, D), in place. RoPE turns the first R columns of each head."""
    if not layer.has_finish:
        return
    values = _upcast(keys)
    if layer.k_norm_weight is not None:
        values = values * _inverse_rms(values, layer.eps) * (_upcast(layer.k_norm_weight) + layer.norm_offset)
    if layer.cos is not None and layer.sin is not None:
        values = _rotate(values, _upcast(layer.cos).unsqueeze(2), _upcast(layer.sin).unsqueeze(2))
    keys.copy_(values)


def finish_gradient(dkeys: Tensor, raw: Tensor | None, layer: Projection) -> tuple[Tensor, Tensor | None]:
    """Gradients of the keys before :func:`finish_keys` (``raw``, needed with a head norm), and of the norm's weight
    (D,)."""
    if not layer.has_finish:
        return dkeys, None
    values, dweight = _upcast(dkeys), None
    if layer.cos is not None and layer.sin is not None:
        values = _rotate_back(values, _upcast(layer.cos).unsqueeze(2), _upcast(layer.sin).unsqueeze(2))
    if raw is not None and layer.k_norm_weight is not None:
        gain = _upcast(layer.k_norm_weight) + layer.norm_offset
        values, dweight = _rms_norm_gradient(values, _upcast(raw), gain, layer.eps)
    return values.to(dkeys.dtype), dweight


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
