"""What is installed here, what devices there are, and which implementations of the attention they can run."""

from __future__ import annotations

import platform

import torch

from palkernels import unsupported_reasons
from palkernels.bench import machine

__all__ = ["diagnosis"]

PACKAGES = ("palkernels", "torch", "triton", "transformers", "numpy", "torchaudio", "soundfile", "matplotlib")
IMPLEMENTATIONS = ("reference", "sdpa", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GIB = 2**30


def diagnosis() -> str:
    """The report of `palkernels doctor`."""
    lines = ["versions", f"  python        {platform.python_version()}"]
    for name in PACKAGES:
        lines.append(f"  {name:12}  {machine.package_version(name) or 'not installed'}")

    bf16 = "with" if machine.cpu_has_bf16() else "without"
    available = machine.available_bytes()
    memory = "" if available is None else f", {available / GIB:.1f} GiB of memory available"
    lines += [
        "",
        "devices",
        f"  cpu     {machine.cpu_name()}, {torch.get_num_threads()} threads, {bf16} bf16{memory}",
    ]
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"  cuda:{index}  {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / GIB:.1f} GiB"
        )
        devices.append(f"cuda:{index}")
    if len(devices) == 1:
        lines.append(f"  no GPU: {_why_no_gpu()}")

    lines += ["", "implementations of lal_attention (inference; and training, where it differs)"]
    for device in devices:
        for impl in IMPLEMENTATIONS:
            lines += _implementation(device, impl)
    return "\n".join(lines)


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without CUDA"
    return "PyTorch finds no CUDA device"


def _implementation(device: str, impl: str) -> list[str]:
    """One line saying where `impl` runs on `device`, and one for each distinct reason against it."""
    runs: dict[bool, list[str]] = {False: [], True: []}
    against: dict[str, list[str]] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for training in (False, True):
            reasons = _reasons(device, dtype, impl, training)
            if not reasons:
                runs[training].append(name)
            for reason in reasons:
                against.setdefault(reason, []).append(name + (" training" if training else ""))
    inference, training_dtypes = (", ".join(runs[training]) or "no" for training in (False, True))
    verdict = inference if inference == training_dtypes else f"{inference}; training: {training_dtypes}"
    lines = [f"  {device:6}  {impl:9}  {verdict}"]
    everything = 2 * len(DTYPES)
    for reason, where in against.items():
        if len(where) == everything:
            scope = ""
        elif all(x.endswith(" training") for x in where) and len(where) == len(DTYPES):
            scope = "training: "
        else:
            scope = f"{', '.join(x for x in where if not x.endswith(' training')) or ', '.join(where)}: "
        lines.append(f"    {scope}{reason}")
    return lines


def _reasons(device: str, dtype: torch.dtype, impl: str, training: bool) -> list[str]:
    query = torch.zeros(1, 2, 1, 64, device=device, dtype=dtype, requires_grad=training)
    key = torch.zeros(1, 1, 1, 64, device=device, dtype=dtype)
    with torch.enable_grad():
        return list(unsupported_reasons(query, key, key, key, key, impl=impl))
