"""Which device runs the kernels: the one place that says so, which the stand-in for a GPU changes."""

import torch

kernel_device = "cuda"  # a device type; in the process of the stand-in "cpu", whose tensors pose as a GPU's


def runs_kernels(device: torch.device) -> bool:
    """Whether compiled kernels run on a device of this type."""
    return device.type == kernel_device


def is_host(device: torch.device) -> bool:
    """Whether values are read there without waiting for a device."""
    return device.type == "cpu" and not runs_kernels(device)


def index(device: torch.device) -> int:
    """The number of a device that runs kernels."""
    return device.index or 0
