"""Audio keys and values in eight bits, for generation over long sound: half the memory that 16 bits take."""

from typing import Any

import torch
from torch import Tensor

from palkernels import dtypes
from palkernels.dispatch import raise_problems, values_are_checked
from palkernels.dtypes import EIGHT_BITS

LARGEST = torch.finfo(EIGHT_BITS).max  # 448
LEAST_SCALE = 2.0**-120  # of a head that holds zeros alone


def quantize_audio_kv(
    audio_key: Tensor, audio_value: Tensor, *, audio_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Audio keys and values as float8_e4m3fn, with a scale for each audio row and K/V head.

    For :func:`palkernels.lal_attention` without gradients, decoding above all::

        key, value, key_scale, value_scale = quantize_audio_kv(audio_key, audio_value, audio_lengths=lengths)
        lal_attention(..., key, value, audio_key_scale=key_scale, audio_value_scale=value_scale, audio_lengths=lengths)

    A scale is the largest magnitude in the row's valid tokens over 448, the largest number of the dtype. Each element,
    divided by its scale, is rounded to the nearest number: by at most 1/16 of its magnitude, or by the scale's 2^-10.
    Padding becomes zero, whatever it holds. As measured on random normal numbers, attention's output for a head is then
    off by 4.5 % of its norm, 0.3 % in bfloat16; docs/kernels.md has more.

    Args:
        audio_key, audio_value: (A, Hkv, N, D), float16, bfloat16, float32 or float64, as :func:`palkernels.audio_kv`
            returns them. Valid tokens must be finite. On CUDA that is checked only with PALKERNELS_CHECK=1; otherwise
            one that is not makes its whole row and head NaN.
        audio_lengths: (A,) valid tokens of each audio row, of any integer dtype; None: all N.

    Returns:
        audio_key, audio_value: (A, Hkv, N, D), float8_e4m3fn, with their dimensions in the same order in memory.
        audio_key_scale, audio_value_scale: (A, Hkv), float32, positive.

    Raises:
        TypeError: a wrong type or dtype; or a tensor that requires gradients, which nothing here has, while they are
            enabled.
        ValueError: a wrong shape, device or value.
    """
    tensors = {"audio_key": audio_key, "audio_value": audio_value}
    raise_problems(_problems(tensors, audio_lengths))
    padding = None
    if audio_lengths is not None:
        places = torch.arange(audio_key.shape[2], device=audio_key.device)
        padding = (places >= audio_lengths.to(torch.int64)[:, None])[:, None, :, None]
    (key, key_scale), (value, value_scale) = (_quantize(x, padding) for x in tensors.values())
    if values_are_checked(audio_key):
        scales = {"audio_key": key_scale, "audio_value": value_scale}
        names = [name for name, scale in scales.items() if not bool(scale.isfinite().all())]
        wanted = "finite in valid tokens, and over 448 in float32's range"
        raise_problems([ValueError(f"{name} must be {wanted}, got NaN, Inf or more") for name in names])
    return key, value, key_scale, value_scale


def _quantize(tensor: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    if padding is not None:
        wide.masked_fill_(padding, 0)
    largest = wide.abs().amax(dim=(2, 3)) if wide.numel() else wide.new_zeros(wide.shape[:2])
    scale = (largest / LARGEST).to(torch.float32).clamp(min=LEAST_SCALE)
    wide.div_(scale.to(wide.dtype)[:, :, None, None]).clamp_(-LARGEST, LARGEST)
    return wide.to(EIGHT_BITS), scale


def _problems(tensors: dict[str, Any], audio_lengths: Any) -> list[Exception]:
    problems: list[Exception] = []
    given = tensors if audio_lengths is None else tensors | {"audio_lengths": audio_lengths}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            problems.append(TypeError(f"{name} must be a tensor, got {type(tensor).__name__}"))
    if problems:
        return problems
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes.FLOATS:
            problems.append(TypeError(f"{name} must be {dtypes.float_names()}, got {tensor.dtype}"))
        if tensor.requires_grad and torch.is_grad_enabled():
            problems.append(TypeError(f"{name} must not require gradients, which eight bits do not carry, got it does"))
    if audio_lengths is not None and audio_lengths.dtype not in dtypes.INTEGERS:
        problems.append(TypeError(f"audio_lengths must have an integer dtype, got {audio_lengths.dtype}"))
    key, value = tensors.values()
    if problems:
        return problems
    for name, tensor in given.items():
        if tensor.device != key.device:
            problems.append(ValueError(f"{name} must be on audio_key's device {key.device}, got {tensor.device}"))
    shape = tuple(key.shape)
    if len(shape) != 4:
        problems.append(ValueError(f"audio_key must be (A, Hkv, N, D), got shape {shape}"))
    elif audio_lengths is not None and tuple(audio_lengths.shape) != shape[:1]:
        problems.append(ValueError(f"audio_lengths must be (A,) = {shape[:1]}, got shape {tuple(audio_lengths.shape)}"))
    elif audio_lengths is not None and audio_lengths.numel() and values_are_checked(key):
        low, high = (int(x) for x in torch.aminmax(audio_lengths.to(torch.int64)))
        if low < 0 or high > shape[2]:
            problems.append(
                ValueError(f"audio_lengths must be 0 to N = 0 to {shape[2]}, got values from {low} to {high}")
            )
    if value.shape != key.shape:
        problems.append(
            ValueError(f"audio_value must be of audio_key's shape = {shape}, got shape {tuple(value.shape)}")
        )
    return problems
