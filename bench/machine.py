"""What this machine is, and how much memory a run may take of it."""

from __future__ import annotations

import gc
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = [
    "available_bytes",
    "cpu_has_bf16",
    "cpu_name",
    "is_out_of_memory",
    "memory_limit",
    "package_version",
    "release_memory",
    "sync",
]

_MARGIN = 256 * 2**20  # left to everything else on the machine
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed")


def cpu_name() -> str:
    """Return the processor's name, as /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def cpu_has_bf16() -> bool:
    """Say whether the processor multiplies bfloat16 matrices itself. Without that, bf16 is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def package_version(name: str) -> str | None:
    """Return a package's installed version, or None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def sync(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Free what nothing holds any more, the allocator's reserves on a GPU included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory did not suffice. PyTorch's CPU allocator raises a plain RuntimeError, and
    only its text tells it from others."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)


@contextmanager
def memory_limit() -> Iterator[int | None]:
    """Let an allocation beyond the memory at hand fail inside this process; yields the limit, or None.

    Linux hands out more memory than it has and kills the process once it is touched: no exception, and no
    result for the points already measured. RLIMIT_DATA counts every private writable mapping, so it is set to
    what the process has mapped now plus what the machine and its control groups still have. The old limit
    comes back afterwards.
    """
    available, used = available_bytes(), _proc_bytes("/proc/self/status", "VmData")
    if available is None or used is None:  # not Linux
        yield None
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + max(available - _MARGIN, 0)
    for other in (soft, hard):
        limit = limit if other == resource.RLIM_INFINITY else min(limit, other)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available_bytes() -> int | None:
    """Return the bytes that can still be taken without swapping, control groups included; None: not known."""
    free = [_proc_bytes("/proc/meminfo", "MemAvailable"), *_control_groups()]
    known = [value for value in free if value is not None]
    return max(min(known), 0) if known else None


def _proc_bytes(path: str, key: str) -> int | None:
    """Return an entry of a file of /proc, in bytes; None where it is not to be had."""
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _control_groups() -> Iterator[int]:
    """Yield the bytes that each memory control group of this process, and each one above it, still allows."""
    try:
        entries = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            group = root.joinpath(*parts[:depth])
            try:
                limit = int((group / names[0]).read_text())  # "max" is no number: no limit here
                used = int((group / names[1]).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield limit - used + int(stat.get(names[2], 0))  # file pages are given back on demand
            except (OSError, ValueError):
                continue
