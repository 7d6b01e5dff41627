"""A stand-in for Gluon on a CPU: kernels as they are written, whose warps, copies and products overlap as on a GPU.

`run` executes a launch on CPU tensors. A kernel's functions run as Python, on tiles that are tensors; `gl` and Triton's
modules are replaced in what they see. Each partition of `warp_specialize` is a thread; which one goes on, or which copy
lands, is chosen at random from a seed wherever one could wait for another.

Faults of the kernel raise, as `support.warps` says; so does what is read or written outside of its tensor, and what is
read and is NaN, with which tests fill what must not be read.
"""

from types import FunctionType, ModuleType, SimpleNamespace

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from palkernels.kernels.gluon.forward import async_load
from support.warps import Barrier, KernelError, Machine, Product, Slot, Stages, here


class Pointer:
    """Into the memory of a tensor, by offsets in elements."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + torch.as_tensor(offset).long())

    def places(self, mask):
        mask = torch.as_tensor(True if mask is None else mask).expand(self.offset.shape)
        used = self.offset[mask]
        if ((used < 0) | (used >= len(self.memory))).any():
            raise KernelError("memory must be accessed within its tensor")
        return self.offset, mask


def load(pointer, mask=None):
    offsets, mask = pointer.places(mask)
    values = torch.zeros(offsets.shape, dtype=pointer.memory.dtype)
    values[mask] = pointer.memory[offsets[mask]]
    if values.isnan().any():
        raise KernelError("what no query sees must not be read")
    return values


def store(pointer, values, mask):
    offsets, mask = pointer.places(mask)
    pointer.memory[offsets[mask]] = values[mask]


def async_copy_to_shared(slot, pointers, mask):
    by = here.partition
    by.pause()
    slot.begin_write(by)
    values = load(pointers, mask)
    assert tuple(values.shape) == slot.shape

    def land():
        by.copied += 1
        slot.values.copy_(values)
        slot.written = f"{by.name}'s copies", by.copied

    by.copies.append(land)


def arrive_when_copied(barrier, increment_count):
    assert not increment_count
    by = here.partition
    known = by.release()

    def land():
        known[f"{by.name}'s copies"] = by.copied
        barrier.arrive(known, by.threads)

    by.copies.append(land)


def init(barrier, count):
    barrier.count = barrier.pending = count


def wait(barrier, parity):
    by, parity = here.partition, int(parity)
    by.pause(lambda: barrier.completed & 1 != parity, f"parity {parity} of {barrier.name}")
    by.clock.join(barrier.published)


def arrive(barrier):
    by = here.partition
    by.pause()
    barrier.arrive(by.release(), 1)


def fence():
    here.partition.fenced.join(here.partition.clock)


def warpgroup_mma(left, right, accumulator, use_acc=True, is_async=False):
    assert is_async
    here.partition.pause()
    product = Product(here.partition, left, right, accumulator if use_acc else torch.zeros_like(accumulator))
    here.partition.products.append(product)
    return product


def warpgroup_mma_wait(outstanding, deps):
    by = here.partition
    by.pause()
    while len(by.products) > outstanding:
        product = by.products.pop(0)
        product.end()
        if isinstance(product.left, torch.Tensor) and all(x is not product.left for x in deps):
            raise KernelError("a product's operand in registers must be kept until it has ended")
    results = [x.value if isinstance(x, Product) else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def allocate_shared_memory(dtype, shape, layout):
    machine = here.partition.machine
    machine.allocations += 1
    stages, *tile = shape
    if dtype == torch.int64:
        return Stages(Barrier(f"barrier {i} of allocation {machine.allocations}") for i in range(stages))
    return Stages(Slot(f"stage {i} of allocation {machine.allocations}", dtype, tile) for i in range(stages))


def _tensors(*values):
    return [torch.as_tensor(value) for value in values]


_shared = SimpleNamespace(
    cast=lambda x, dtype: torch.as_tensor(x).to(dtype), load=load, cdiv=lambda x, y: (x + y - 1) // y,
    maximum=lambda *x: torch.maximum(*_tensors(*x)), minimum=lambda *x: torch.minimum(*_tensors(*x)),
    where=torch.where, exp2=torch.exp2, log=torch.log, constexpr=lambda x: x,
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), static_range=range,
    **{name: getattr(torch, name) for name in ("int32", "int64", "float16", "bfloat16", "float32")},
)  # fmt: skip
_language = SimpleNamespace(
    **vars(_shared), store=store, allocate_shared_memory=allocate_shared_memory,
    program_id=lambda axis: torch.tensor(here.partition.machine.program, dtype=torch.int32),
    arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    convert_layout=lambda x, layout: x.clone(),
    warp_specialize=lambda *arguments: here.partition.machine.specialise(*arguments),
    NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
    **dict.fromkeys(
        ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"), lambda *_: None
    ),
)  # fmt: skip
_REPLACED = {
    id(gl): _language, id(tl): _shared, id(hopper.fence_async_shared): fence,
    id(async_load): async_copy_to_shared,
    id(hopper.async_copy): SimpleNamespace(mbarrier_arrive=arrive_when_copied),
    id(hopper.mbarrier): SimpleNamespace(init=init, wait=wait, arrive=arrive, MBarrierLayout=lambda: None),
    id(hopper.warpgroup_mma): warpgroup_mma, id(hopper.warpgroup_mma_wait): warpgroup_mma_wait,
}  # fmt: skip


def _as_python(value, modules):
    """A value that a kernel's function sees, as the stand-in has it: functions of Triton's as they are written."""
    if id(value) in _REPLACED:
        return _REPLACED[id(value)]
    if isinstance(value, tl.constexpr):
        return value.value
    function = getattr(value, "fn", None)
    if not isinstance(function, FunctionType):
        return value
    names = function.__globals__
    if id(names) not in modules:
        modules[id(names)] = seen = {}
        seen.update(
            {
                name: _as_python(x, modules)
                for name, x in names.items()
                if not isinstance(x, ModuleType) or id(x) in _REPLACED
            }
        )
    return FunctionType(function.__code__, modules[id(names)], function.__name__, function.__defaults__)


def _argument(value):
    if isinstance(value, torch.Tensor):
        memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return Pointer(memory, torch.tensor(value.storage_offset()))
    if isinstance(value, tuple):
        return type(value)(*map(_argument, value))
    return torch.tensor(value, dtype=torch.int32) if type(value) is int and value < 2**31 else value


def run(launch, seed=0):
    """Run all programs of a launch of a Gluon kernel on CPU tensors."""
    kernel = _as_python(launch.kernel, {})
    arguments = [_argument(x) for x in launch.arguments]
    names = launch.kernel.arg_names[len(arguments) :]
    for program in range(launch.num_programs):
        Machine(program, seed).run(kernel, [*arguments, *(launch.constants[name] for name in names)])
