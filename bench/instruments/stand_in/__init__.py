"""A stand-in for a GPU: CPU tensors pose as those of an H200 under a CUDA driver that does nothing.

Triton's own binder, cache, compiler and C launcher run, and torch.cuda answers as it would on an H200. So the host's
part of a call takes its real way, is timed and is counted, on a machine without a GPU. Call :func:`enter` first of all
in a process of its own: it replaces functions of torch, for good.

    python -c "from palkernels.bench.instruments import stand_in; stand_in.enter(); ..."

What it cannot show is in LIMITS. `stream`, `capturing` and `device` say what torch.cuda tells of the current stream
and device, and may be set: `stand_in.stream = 7`. All threads have them in common.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palkernels import devices
from palkernels.bench.errors import UserError, one_line
from palkernels.bench.instruments.stand_in.build import LIBRARY, build_driver

__all__ = ["DEVICES", "LIMITS", "Launch", "child_environment", "enter", "launched", "launches"]

DEVICES = 2  # as many as torch.cuda counts
KEPT = 4096  # launches, as in driver.c
LIMITS = (
    "no kernel runs, and results are memory as it happened to be",
    "times are those of this machine's processor, without what the CUDA driver takes for a launch",
    "PyTorch's allocator for CPUs answers instead of CUDA's, and nothing waits for a GPU",
    "a backward pass runs on the calling thread, where a GPU's has a thread of its own",
    "PyTorch's own operations run on the CPU, within the time",
)


stream = 0  # the handle of the current stream; 0 is the default stream
capturing = False  # whether the current stream is being captured
device = 0  # the index of the current device, which is also that of every tensor

_driver: Any = None  # once entered


@dataclass(frozen=True)
class Launch:
    """One launch: the compiled kernel's name, the stream, the programs on each axis, and what the kernel was given."""

    kernel: str
    stream: int
    grid: tuple[int, int, int]
    parameters: tuple[
        int, ...
    ]  # without constants, as unsigned numbers; tuples lie flat, two scratch buffers come last


def child_environment() -> dict[str, str]:
    """Return the environment of a process that will enter: this one's, without GPUs and the interpreter."""
    left_out = ("TRITON_INTERPRET", "TRITON_LIBCUDA_PATH")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {"CUDA_VISIBLE_DEVICES": ""}


def enter() -> None:
    """Turn this process into the stand-in's; a second call does nothing.

    Raises:
        UserError: there is a GPU, or CUDA or Triton have been used already, Triton interprets, or there is no compiler.
    """
    global _driver
    if _driver is not None:
        return
    _refuse()
    from triton import knobs

    cache = Path(knobs.cache.dir) / "palkernels-stand-in"
    folder = build_driver(cache)
    # A folder of its own: what Triton links against this driver must not be found where there is a GPU.
    os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    driver = ctypes.CDLL(str(folder / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(ctypes.CDLL(LIBRARY), "stand_in_launches"):
        raise UserError(f"no {LIBRARY} must be loaded before the stand-in's, got one")
    for function, result in (("launches", ctypes.c_uint64), ("launch", ctypes.POINTER(_Launch))):
        getattr(driver, f"stand_in_{function}").restype = result
    driver.stand_in_launch.argtypes = [ctypes.c_uint64]
    _pose()
    _driver = driver
    devices.kernel_device = "cpu"
    _activate()


def launches() -> int:
    """Return how many kernels this process has launched."""
    return int(_driver.stand_in_launches())


def launched(since: int = 0) -> list[Launch]:
    """Return the launches from number `since` on, as far as they are kept: the newest 4,096."""
    first = max(since, launches() - KEPT)
    kept = (_driver.stand_in_launch(number).contents for number in range(first, launches()))
    return [Launch(x.kernel.decode(), x.stream, tuple(x.grid), tuple(x.parameters[: x.num_parameters])) for x in kept]


class _Launch(ctypes.Structure):
    """As in driver.c; a kernel begins with its name."""

    _fields_ = (
        ("kernel", ctypes.c_char_p), ("stream", ctypes.c_uint64), ("grid", ctypes.c_uint64 * 3),
        ("num_parameters", ctypes.c_uint64), ("parameters", ctypes.c_uint64 * 128),
    )  # fmt: skip


def _refuse() -> None:
    cuda: Any = torch.cuda  # parts of it have no types
    if cuda.is_initialized():
        raise UserError("the stand-in must be entered before torch.cuda is used")
    asked = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # which loads no driver of CUDA's
    try:
        available = cuda.is_available()
    finally:
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
        if asked is not None:
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = asked
    if available:
        raise UserError("the stand-in must be entered without a GPU (CUDA_VISIBLE_DEVICES=''), got one")
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise UserError(f"the stand-in must have triton, got: {error}") from error
    if triton.knobs.runtime.interpret:
        raise UserError("the stand-in must be entered without TRITON_INTERPRET=1")


def _activate() -> None:
    """Let Triton launch by the driver that does nothing."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    try:
        driver.set_active(CudaDriver())
    except Exception as error:  # of a compiler, a linker, or a system without Python's headers
        wanted = "triton must build its launcher, which takes a C compiler and Python's headers"
        raise UserError(f"{wanted}, got: {one_line(error)}") from error


class _Properties:
    """What the library and Triton ask of an H200."""

    name = "NVIDIA H200 (stand-in)"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 141 * 10**9
    L2_cache_size = 60 * 2**20
    warp_size = 32
    regs_per_multiprocessor = 65_536
    max_threads_per_multi_processor = 2048
    shared_memory_per_block_optin = 227 * 1024
    is_integrated = is_multi_gpu_board = 0
    gcnArchName = ""  # noqa: N815


class _Stream:
    """A stream: its handle is a number of its own."""

    created = 0

    def __init__(
        self, device: Any = None, priority: int = 0, *, stream_id: int | None = None, device_index: int | None = None,
        device_type: int = 1,
    ) -> None:  # fmt: skip
        if stream_id is None:
            _Stream.created += 1
            stream_id = _Stream.created
        self.stream_id = self.cuda_stream = stream_id
        self.device_index = _device_index(device, optional=True) if device_index is None else device_index
        self.device_type = device_type
        self.priority = priority

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.device_index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and (other.stream_id, other.device) == (self.stream_id, self.device)

    def __hash__(self) -> int:
        return hash((self.stream_id, self.device_index))

    def __enter__(self) -> _Stream:
        cuda: Any = torch.cuda
        self._entered = cuda.stream(self)
        self._entered.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._entered.__exit__(*raised)

    def wait_stream(self, other: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _device_index(given: Any, optional: bool = False, allow_cpu: bool = False) -> int:
    """Return an index as torch.cuda does; the device of tensors, which they call the CPU, is the current one."""
    if isinstance(given, int):
        return given
    index: int | None = torch.device(given).index if isinstance(given, str) else getattr(given, "index", None)
    return device if index is None else index


def _exchange_device(index: int) -> int:
    global device
    previous = device
    if index >= 0:
        device = index
    return previous


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    global stream, device
    stream, device = stream_id, device_index


def _pose() -> None:
    """Replace what torch.cuda asks of the CUDA runtime."""
    cuda: Any = torch.cuda
    runtime: Any = torch._C
    with warnings.catch_warnings():  # autograd counts the GPUs, once a process, and would warn that it found none
        warnings.simplefilter("ignore")
        getattr(runtime, "_cuda_getDeviceCount", int)()
    in_runtime = {
        "_cuda_getDevice": lambda: device,
        "_cuda_setDevice": _exchange_device,
        "_cuda_exchangeDevice": _exchange_device,
        "_cuda_maybeExchangeDevice": _exchange_device,
        "_cuda_getDeviceCount": lambda: DEVICES,
        "_cuda_getCurrentRawStream": lambda index: stream,
        "_cuda_getCurrentStream": lambda index: (stream, device, 1),
        "_cuda_getDefaultStream": lambda index: (0, device, 1),
        "_cuda_setStream": _set_stream,
        "_cuda_isCurrentStreamCapturing": lambda: capturing,
        "_cuda_synchronize": lambda: None,
        "_cuda_emptyCache": lambda: None,
    }
    for name, function in in_runtime.items():
        setattr(runtime, name, function)
    cuda._initialized = True
    cuda._cached_device_count = DEVICES
    cuda.is_available = lambda: True
    cuda.default_generators = tuple(torch.Generator() for _ in range(DEVICES))
    cuda._exchange_device = cuda._maybe_exchange_device = _exchange_device
    cuda._get_device_properties = lambda index: _Properties
    cuda._get_device_index = _device_index
    cuda._utils._get_device_index = _device_index
    cuda.is_current_stream_capturing = cuda.graphs.is_current_stream_capturing = lambda: capturing
    cuda.Stream = cuda.streams.Stream = _Stream
    cuda.memory.empty_cache = cuda.empty_cache = lambda: None
