"""What is installed here and whether it is tested, what devices there are, and what of the attention they can run."""

from __future__ import annotations

import platform

import torch

from palkernels import unsupported_reasons
from palkernels.bench import machine, versions
from palkernels.bench.options import dtype_name
from palkernels.bench.report.document import GIB
from palkernels.kernels.gluon import choice

__all__ = ["diagnosis"]

PACKAGES = ("palkernels", "torch", "triton", "transformers", "numpy", "torchaudio", "soundfile", "matplotlib")
IMPLEMENTATIONS = ("reference", "sdpa", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def diagnosis() -> str:
    """Return the report of `palkernels doctor`."""
    lines = ["versions"]
    installed = {"python": platform.python_version()} | {name: machine.package_version(name) for name in PACKAGES}
    for name, version in installed.items():
        untested = None if version is None else versions.against(name, version)
        lines.append(f"  {name:12}  {version or 'not installed'}{f' ({untested})' if untested else ''}")

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

    lines += ["", "ptxas, which assembles the Triton kernels"]
    for capability in versions.CAPABILITIES:
        lines += _assembler(capability)

    lines += ["", "forward of triton on compute capability 9.x", f"  {_forward()}"]

    lines += ["", "implementations of lal_attention, in inference and training"]
    for device in devices:
        for impl in IMPLEMENTATIONS:
            lines += _implementation(device, impl)
    return "\n".join(lines)


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without CUDA"
    return "PyTorch finds no CUDA device"


def _assembler(capability: int) -> list[str]:
    """Return a line saying which ptxas compiles for a compute capability, and one with what is known against it."""
    try:
        ptxas = versions.find_assembler(capability)
    except RuntimeError as error:
        return [f"  sm_{capability:<4}  none: {error}"]
    of = "triton's own" if ptxas.variable is None else f"{ptxas.variable}={ptxas.path}"
    known = ptxas.against()
    return [f"  sm_{capability:<4}  {ptxas.version}, {of}"] + ([f"    {known}"] if known else [])


def _forward() -> str:
    """Return which kernel it takes, by the switch."""
    if not choice.ON:
        return "the Triton kernel (PALKERNELS_GLUON=1 switches the Gluon kernel on)"
    if not choice.has_gluon():
        return "the Triton kernel: PALKERNELS_GLUON=1 is set, but triton has no triton.experimental.gluon"
    return "the Gluon kernel where it takes a call, otherwise the Triton kernel (PALKERNELS_GLUON=1)"


def _implementation(device: str, impl: str) -> list[str]:
    """Return a line saying in which dtypes `impl` runs on `device`, and one for each distinct reason against it."""
    runs: list[str] = []
    against: dict[str, list[str]] = {}
    for dtype in DTYPES:
        name = dtype_name(dtype)
        query = torch.zeros(1, 2, 1, 64, device=device, dtype=dtype)
        key = query[:, :1]
        reasons = unsupported_reasons(query, key, key, key, key, impl=impl)
        if not reasons:
            runs.append(name)
        for reason in reasons:
            against.setdefault(reason, []).append(name)
    lines = [f"  {device:6}  {impl:9}  {', '.join(runs) or 'no'}"]
    for reason, names in against.items():
        scope = "" if len(names) == len(DTYPES) else f"{', '.join(names)}: "
        lines.append(f"    {scope}{reason}")
    return lines
