"""A launch made ready to be repeated: everything but the pointers is settled, and Triton's binder has nothing to do.

Binding, specialising and looking up a kernel's arguments takes the host far longer than the kernel takes the GPU. A
repetition hands the compiled kernel's launcher plain integers, which is all that a GPU is given in the end.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from palkernels import devices
from palkernels.kernels import tiles
from palkernels.kernels.launch import Launch
from palkernels.plans import ALIGNMENT, Plans, geometry, usable


class Slot(NamedTuple):
    """One argument of a kernel. What of it is a pointer comes from the operand at ``place``."""

    place: int | None  # None: no pointer in it; SEVERAL: a tuple with pointers at any of its places
    rest: Any  # the argument; or a Matrix's strides, None for a bare pointer; or (operand, True) and (number, False)


SEVERAL = -1


class ReadyLaunch:
    """A launch to be repeated with other pointers."""

    __slots__ = ("_compiled", "_function", "_metadata", "_run", "_slots", "_tail", "kernel", "num_programs")

    def __init__(self, launch: Launch, compiled: Any, slots: list[Slot]) -> None:
        last = max(place for place, slot in enumerate(slots) if slot.place is not None)
        self.kernel = launch.kernel
        self._slots = slots[: last + 1]
        constants = [launch.constants[name] for name in self.kernel.arg_names[len(launch.arguments) :]]
        self._tail = (*launch.arguments[last + 1 :], *constants)
        self.num_programs = launch.num_programs
        self._compiled = compiled  # which unloads its code when nothing refers to it any more
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata

    def run(self, stream: int, pointers: Sequence[int]) -> None:
        """Launch it on a stream of the current device. ``pointers`` has one for each operand; absent ones are 0."""
        arguments = [
            rest
            if place is None
            else pointers[place]
            if rest is None
            else (pointers[place], *rest)
            if place >= 0
            else tuple([pointers[which] if is_operand else which for which, is_operand in rest])
            for place, rest in self._slots
        ]
        self._run(
            self.num_programs, 1, 1, stream, self._function, self._metadata, None, None, None, *arguments, *self._tail
        )

    def with_numbers(self, num_programs: int, numbers: Mapping[str, Any]) -> "ReadyLaunch":
        """The same kernel with other numbers, by the names of its arguments; a Matrix's are its strides."""
        new = object.__new__(ReadyLaunch)
        new.kernel, new._compiled = self.kernel, self._compiled
        new._run, new._function, new._metadata = self._run, self._function, self._metadata
        new.num_programs = num_programs
        slots, tail = list(self._slots), list(self._tail)
        for name, value in numbers.items():
            place = self.kernel.arg_names.index(name)
            if place < len(slots):
                slots[place] = Slot(slots[place].place, value)
            else:
                tail[place - len(slots)] = value
        new._slots, new._tail = slots, tuple(tail)
        return new


def repeat(launches: Sequence[ReadyLaunch], operands: Sequence[Tensor | None], device: torch.device) -> bool:
    """Launch them with these operands; whether they were: where they must not be repeated now, nothing is launched."""
    index = devices.index(device)
    pointers = [0 if x is None else x.data_ptr() for x in operands]
    if not repeatable(index, launches) or reduce(operator.or_, pointers) % ALIGNMENT:
        return False
    stream = torch._C._cuda_getCurrentRawStream(index)
    for launch in launches:
        launch.run(stream, pointers)
    return True


LAUNCHES: Plans[ReadyLaunch] = Plans()
_hooks_of = operator.attrgetter("kernel.pre_run_hooks")


def run(build: Callable[[], Launch], operands: Sequence[Tensor | None], *numbers: Any) -> None:
    """Run a launch, or repeat the one of an earlier call that looked alike.

    Args:
        build: makes the launch.
        operands: the tensors that it reads or writes, the first of them not None.
        numbers: all else that it depends on, such as the kernel's name.
    """
    seen = geometry(operands, numbers) if usable() else None
    known = None if seen is None else LAUNCHES.get(seen)
    if known is not None and repeat((known,), operands, operands[0].device):  # type: ignore[union-attr]
        return
    launch = build()
    compiled = launch.run()
    if seen is not None:
        new = ready(launch, compiled, operands)
        if new is not None:
            LAUNCHES.keep(seen, new)


def ready(launch: Launch, compiled: Any, operands: Sequence[Tensor | None]) -> ReadyLaunch | None:
    """A launch that has run, made ready; None where that is not possible.

    It is not where nothing was launched, or not under the conditions of :func:`repeatable`; where an operand is not
    aligned; where the launch reads a tensor that is no operand (a copy); and where two operands lie at one place: which
    is which cannot be told then, and they may lie apart the next time.

    Args:
        launch: the launch.
        compiled: what its ``run`` returned.
        operands: the tensors whose pointers each repetition brings, in its order; None for those that are absent.
    """
    present = [(tensor.data_ptr(), place) for place, tensor in enumerate(operands) if tensor is not None]
    places = dict(present)
    if compiled is None or len(places) < len(present) or reduce(operator.or_, places) % ALIGNMENT:
        return None
    if not repeatable(devices.index(launch.device)):
        return None
    slots = [_slot(argument, places) for argument in launch.arguments]
    if None in slots:
        return None
    return ReadyLaunch(launch, compiled, slots)  # type: ignore[arg-type]


def repeatable(index: int, launches: Sequence[ReadyLaunch] = ()) -> bool:
    """Whether launches may be repeated, or kept for it, on device ``index`` now; otherwise they take the long way.

    That is so where another device is current; while a CUDA graph captures, which must own all that it uses; with other
    tiles than those that were chosen; and where somebody watches or changes Triton's launches, a profiler for example.
    """
    runtime = knobs.runtime
    return not (
        torch._C._cuda_getDevice() != index
        or torch.cuda.is_current_stream_capturing()
        or tiles.overrides
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or any(map(_hooks_of, launches))
    )


def _slot(argument: Any, places: Mapping[int, int]) -> Slot | None:
    """The slot of one argument; None if a pointer in it belongs to no operand."""
    if isinstance(argument, Tensor):
        place = places.get(argument.data_ptr())
        return None if place is None else Slot(place, None)
    if not isinstance(argument, tuple):
        return Slot(None, argument)
    pointers = [places.get(x.data_ptr(), SEVERAL) for x in argument if isinstance(x, Tensor)]
    if SEVERAL in pointers:
        return None
    if not pointers:
        return Slot(None, argument)
    if len(pointers) == 1 and isinstance(argument[0], Tensor):
        return Slot(pointers[0], tuple(argument[1:]))
    rest = tuple((places[x.data_ptr()], True) if isinstance(x, Tensor) else (x, False) for x in argument)
    return Slot(SEVERAL, rest)
