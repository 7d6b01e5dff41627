"""The dtypes that the public functions take, and the one that autocast computes in."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
EIGHT_BITS = torch.float8_e4m3fn  # of audio keys and values that have scales
EIGHT_BITS_NAME = "float8_e4m3fn"
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def float_names() -> str:
    """The float dtypes as an error lists them: "float16, bfloat16, float32, float64"."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)


def computed_in(tensor: Tensor, device: torch.device) -> torch.dtype:
    """The dtype that a tensor is computed in on a device: its own, or autocast's where that is on.

    Autocast leaves float64 alone, as it does for PyTorch's own attention; and what is in eight bits, which has scales.
    """
    autocast = device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)
    if not autocast or tensor.dtype in (torch.float64, EIGHT_BITS):
        return tensor.dtype
    return torch.get_autocast_dtype(device.type)
