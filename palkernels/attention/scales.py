"""Audio keys and values in eight bits: what must hold of a call that has them, and such a call without them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from palkernels.arguments import SCALES, TENSORS, Call
from palkernels.dtypes import EIGHT_BITS, EIGHT_BITS_NAME

AUDIO = ("audio_key", "audio_value")
FIRST = TENSORS.index(SCALES[0])  # its place among a call's tensors


def has_eight_bits(call: Call) -> bool:
    """Whether any of a call's audio has eight bits; its tensors may be anything."""
    return any(getattr(getattr(call, name), "dtype", None) == EIGHT_BITS for name in AUDIO)


def type_problems(call: Call) -> list[Exception]:
    """What is wrong with the dtypes of audio in eight bits and of its scales, whose tensors are tensors."""
    problems: list[Exception] = []
    eight_bits, scales = has_eight_bits(call), call.scales()
    if eight_bits and call.cu_seqlens is not None:  # which has no arguments for scales
        return [TypeError(f"audio of packed rows must not be {EIGHT_BITS_NAME}: lal_attention takes it")]
    if eight_bits and call.audio_key.dtype != call.audio_value.dtype:
        got = " and ".join(str(getattr(call, name).dtype) for name in AUDIO)
        problems.append(TypeError(f"audio_key and audio_value must both be {EIGHT_BITS_NAME} or neither, got {got}"))
    for name in SCALES:
        if eight_bits and name not in scales:
            problems.append(TypeError(f"{name} must be a tensor where audio is {EIGHT_BITS_NAME}, got NoneType"))
        elif not eight_bits and name in scales:
            got = str(call.audio_key.dtype)
            problems.append(TypeError(f"{name} must be None where audio is not {EIGHT_BITS_NAME}, got audio in {got}"))
        elif name in scales and scales[name].dtype != torch.float32:
            problems.append(TypeError(f"{name} must be float32, got {scales[name].dtype}"))
    return problems + _gradient_problems(call) if eight_bits else problems


def _gradient_problems(call: Call) -> list[Exception]:
    tensors = call.floats() | call.scales()
    if not torch.is_grad_enabled() or not (names := [name for name, x in tensors.items() if x.requires_grad]):
        return []
    message = (
        f"with audio in {EIGHT_BITS_NAME} no tensor must require gradients (call within torch.no_grad(), or give audio "
        f"of query's dtype), got {', '.join(names)} that do"
    )
    return [ValueError(message)]


def want_gradients(tensors: Sequence[Tensor | None], of_floats: bool) -> bool:
    """Whether a call, which has scales, is to be refused for gradients.

    Args:
        tensors: a call's, in the order of :class:`Call`.
        of_floats: whether gradients are enabled and one of the float tensors requires them.
    """
    scales = tensors[FIRST : FIRST + len(SCALES)]
    return of_floats or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in scales))


def value_problems(call: Call) -> list[Exception]:
    """Scales that are not positive and finite."""
    problems: list[Exception] = []
    for name, scale in call.scales().items():
        if not bool(((scale > 0) & scale.isfinite()).all()):
            low, high = (float(x) for x in torch.aminmax(scale))
            problems.append(ValueError(f"{name} must be positive and finite, got values from {low} to {high}"))
    return problems


def dequantised(call: Call) -> Call:
    """A prepared call whose audio has query's dtype: products of float32, rounded once."""
    if call.audio_key_scale is None or call.audio_value_scale is None:
        return call
    key = _dequantise(call.audio_key, call.audio_key_scale, call.query.dtype)
    value = _dequantise(call.audio_value, call.audio_value_scale, call.query.dtype)
    return replace(call, audio_key=key, audio_value=value, audio_key_scale=None, audio_value_scale=None)


def _dequantise(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return tensor.to(wide).mul_(scale[:, :, None, None].to(wide)).to(dtype)
