"""Which implementation runs: the one rule, and why no Triton kernel runs on a tensor."""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from palkernels import devices

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "reference")
MIN_CAPABILITY = (8, 0)
MIN_EIGHT_BIT_CAPABILITY = (8, 9)  # that converts float8_e4m3fn
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked for, not imported


def choose(impl: str, triton_reasons: Sequence[str], *, on_cuda: bool) -> str:
    """The implementation that runs where a caller asks for ``impl``: "triton", "sdpa" or "reference".

    "auto" is "triton" for tensors on a CUDA device where nothing speaks against it, and "sdpa" otherwise. Every other
    name is itself.

    Args:
        impl: one of ``IMPLEMENTATIONS``.
        triton_reasons: why Triton cannot run these inputs; it matters for "auto" and "triton" only.
        on_cuda: whether the inputs are on a CUDA device.

    Raises:
        ValueError: ``impl`` is no implementation; or it is "triton", and there are reasons, all of which are named.
    """
    check_impl(impl)
    if impl == "auto":
        return "triton" if on_cuda and not triton_reasons else "sdpa"
    if impl == "triton" and triton_reasons:
        raise ValueError(f"impl='triton' cannot run: {'; '.join(triton_reasons)}")
    return impl


def check_impl(impl: str) -> None:
    """Raise ValueError unless ``impl`` is one of ``IMPLEMENTATIONS``."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")


def raise_problems(problems: Sequence[Exception]) -> None:
    """Raise an error of the first problem's type that names all of them; return where there is none."""
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))


def device_reasons(tensor: Tensor) -> list[str]:
    """Why no Triton kernel runs on a tensor's device or dtype; for a fake tensor none, as no kernel ever runs on it."""
    if not torch.compiler.is_compiling() and is_fake(tensor):
        return []
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton must be installed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        if tensor.dtype == torch.bfloat16:
            reasons.append("bfloat16 must not be used with TRITON_INTERPRET=1: the interpreter computes it wrongly")
    elif not devices.runs_kernels(tensor.device):
        reasons.append(f"tensors must be on a CUDA device (or TRITON_INTERPRET=1 set), got {tensor.device}")
    else:
        if torch.version.hip is not None:
            reasons.append("the device must be an NVIDIA GPU: ROCm is not supported yet")
        elif torch.cuda.get_device_capability(tensor.device) < MIN_CAPABILITY:
            capability = ".".join(map(str, torch.cuda.get_device_capability(tensor.device)))
            reasons.append(f"the GPU must have compute capability 8.0 or more, got {capability}")
        if tensor.dtype == torch.float64:
            reasons.append("float64 must be run with TRITON_INTERPRET=1 or another implementation")
    return reasons


def values_are_checked(tensor: Tensor) -> bool:
    """Whether values are read beside it: on CPU tensors, with PALKERNELS_CHECK=1 on a GPU too; never while tracing."""
    tracing = torch.compiler.is_compiling() or is_fake(tensor)
    return not tracing and (devices.is_host(tensor.device) or os.environ.get("PALKERNELS_CHECK") == "1")


def eight_bit_reasons(tensor: Tensor) -> list[str]:
    """Why no Triton kernel takes float8_e4m3fn on a tensor's device, beyond what :func:`device_reasons` says of it."""
    if not torch.compiler.is_compiling() and is_fake(tensor):
        return []
    if os.environ.get("TRITON_INTERPRET") == "1" or not devices.runs_kernels(tensor.device):
        return []
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability >= MIN_EIGHT_BIT_CAPABILITY:
        return []
    got = ".".join(map(str, capability))
    return [f"the GPU must have compute capability 8.9 or more for float8_e4m3fn, got {got}"]
