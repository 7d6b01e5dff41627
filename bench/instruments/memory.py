"""Peak memory of a block of PyTorch code, counted from the tensors it allocates.

Process size says little about a method: it holds the interpreter, thread pools, the allocator's reserves and
whatever ran before. `AllocationTracker` instead follows every storage that a dispatched operation creates,
until the storage is released, and gives two figures:

- `peak_bytes`: the most bytes alive at once: the static tensors that exist before the block, plus everything that the
  block allocates. Other storages that exist before (inputs) are not counted.
- `peak_above_static_bytes`: the most bytes alive at once outside of the static part (parameters, gradients, optimizer
  states). Methods differ in this part, since the static part is the model's. Both peaks need not coincide.

What belongs to the static part is known only afterwards (a gradient becomes one when it reaches `.grad`), so the
tracker records events and classifies them at the end. Static are the tensors given at the start and to `report()`, by
storage, from the moment each was allocated, and the *contributions* to them. A weight used twice, as a tied embedding
is, has two gradients side by side before autograd sums them; for a vocabulary of 128,256 words each is as large as the
embedding. They belong to the model and to no method. A contribution is recognised by data flow, not by its size (logits
can have exactly a parameter's size): it is an operand of a sum that ran inside a backward pass, has the result's shape,
and whose result is static.

The autograd engine adds to a gradient in place if nobody else holds it and it is no view, but not while a
dispatch mode is active, as one is here. The tracker undoes that: such a sum takes over the bytes of its first
operand if that is released right after it.

`breakdown()` says what the memory at the peak consists of. Memory that never becomes a storage (scratch inside a
kernel, oneDNN's packed weights) is not seen, unless `scratch` is told of it. Tracking costs time, so nothing that is
timed runs under it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from palkernels.bench.instruments.trees import tensors_in

_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
ACTIVATIONS, TEMPORARIES = "activations", "temporaries"
# All are called with an operation and its arguments, as a dispatch mode gets them.
Name = Callable[[Any, tuple[Any, ...], torch.Tensor], str | None]
Scratch = Callable[[Any, tuple[Any, ...]], int]
Inside = Callable[[Any, tuple[Any, ...]], Callable[..., Any] | None]


@dataclass(frozen=True)
class MemoryReport:
    """Bytes; see the module's docstring for what each counts."""

    peak_bytes: int
    peak_above_static_bytes: int
    end_bytes: int


@dataclass(frozen=True)
class _Event:
    """A change in the size of a block, which is a storage's memory. The change takes over the memory of the block
    `replaces` if that is released next."""

    block: int
    delta: int
    replaces: int | None = None


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that counts what the code inside allocates.

    with AllocationTracker(static=model.parameters()) as tracker:
        loss = step()
    report = tracker.report(static=[p.grad for p in model.parameters()])

    Args:
        static: tensors of the static part that exist already.
        device: the type of the device on which memory counts; None: of every device.
        name: returns the name, in `breakdown`, of the memory of a new tensor, from the operation that made it, its
            arguments and the tensor; None if it has no name of its own.
        inside: an operator written in Python hides what it allocates for itself. Returns the function that computes
            such an operator, which then runs in its place and is seen; None for all others.
        scratch: returns the bytes that an operation allocates and frees out of sight.
    """

    def __init__(
        self,
        static: Iterable[torch.Tensor] = (),
        device: str | None = None,
        name: Name | None = None,
        scratch: Scratch | None = None,
        inside: Inside | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self._name = name
        self._scratch = scratch
        self._inside = inside
        self._names: dict[int, str] = {}  # by block, what `name` said
        self._marks: list[int] = []  # the number of events before each mark
        self.current_bytes = 0
        self._sizes: list[int] = []  # by block: its size now
        self._made_in: dict[int, int | None] = {}  # by block: the backward node at work when it was made
        self._live: dict[int, tuple[int, Any]] = {}  # id(storage) -> block, weak reference to the storage
        self._events: list[_Event] = []
        self._sums: list[tuple[int, int]] = []  # (result's block, operand's block)
        self._static: set[int] = set()
        for tensor in static:
            self._static.add(self._block(tensor, counted=True))

    def report(self, static: Iterable[torch.Tensor] = ()) -> MemoryReport:
        """Return the peaks so far, with the tensors in `static` (alive now) added to the static part."""
        known = self._blocks(static) | dict.fromkeys(self._static, "")
        self._add_contributions(known)
        live = above = peak = peak_above = 0
        for event in _in_place_sums(self._events):
            live += event.delta
            above += 0 if event.block in known else event.delta
            peak, peak_above = max(peak, live), max(peak_above, above)
        return MemoryReport(peak, peak_above, live)

    def mark(self) -> None:
        """Begin another segment of the block, for `breakdown`."""
        self._marks.append(len(self._events))

    def breakdown(
        self,
        parts: Mapping[str, Iterable[torch.Tensor]],
        segments: tuple[int, int] | None = None,
        kept_at: int | None = None,
    ) -> dict[str, int]:
        """Return bytes by name at the moment of the peak.

        Args:
            parts: names of tensors alive now; contributions to them have the same name. Other memory has the name that
                the tracker's `name` gave it. Without one, it is activations or temporaries.
            segments: the first and the last segment of which the peak is taken; None: all.
            kept_at: the number of the mark between forward and backward pass: what is alive there is activations.
        """
        names: dict[int, str] = {}
        for part, tensors in parts.items():
            names |= self._blocks(tensors, part)
        self._add_contributions(names)
        events = _in_place_sums(self._events)
        totals = list(accumulate((event.delta for event in events), initial=0))
        bounds = [0, *self._marks, len(events)]
        begin, end = (0, len(events)) if segments is None else (bounds[segments[0]], bounds[segments[1] + 1])
        at_peak = _sizes_after(events[: max(range(begin, end + 1), key=totals.__getitem__)])
        kept = {} if kept_at is None else _sizes_after(events[: self._marks[kept_at]])
        by_name: dict[str, int] = {}
        for block, size in at_peak.items():
            name = names.get(block) or self._names.get(block) or (ACTIVATIONS if block in kept else TEMPORARIES)
            by_name[name] = by_name.get(name, 0) + size
        return by_name

    def _blocks(self, tensors: Iterable[torch.Tensor], name: str = "") -> dict[int, str]:
        return {self._live[key][0]: name for key in map(_key, tensors) if key in self._live}

    def _add_contributions(self, known: dict[int, str]) -> None:
        # Sums are in the order of execution, so one pass from the last to the first also finds the parts of parts.
        for result, operand in reversed(self._sums):
            if result in known:
                known.setdefault(operand, known[result])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        for tensor in inputs:
            self._block(tensor, counted=False)  # first met as an input: it existed before
        function = None if self._inside is None else self._inside(func, args)
        if function is not None:
            with self:
                return function(*args, **kwargs)
        out = func(*args, **kwargs)
        operands: list[int] = []
        replaces: int | None = None
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and func in _SUMS and all(x.shape == out.shape for x in inputs):
            operands = [self._block(x, counted=False) for x in inputs]
            # What one node made and sums itself is part of its formula; the engine sums what several nodes made.
            if any(self._made_in.get(operand) != self._node() for operand in operands) and not inputs[0]._is_view():
                replaces = operands[0]
        for tensor in tensors_in(out):
            known = len(self._sizes)
            result = self._block(tensor, counted=True, replaces=replaces)
            name = self._name(func, args, tensor) if self._name is not None and result >= known else None
            if name is not None:
                self._names[result] = name
            self._sums += [(result, operand) for operand in operands if operand != result]
        taken = 0 if self._scratch is None else self._scratch(func, args)
        if taken:
            block = len(self._sizes)
            self._sizes.append(0)
            self._change(block, taken)
            self._change(block, -taken)
        for tensor in inputs:
            self._block(tensor, counted=False)  # an in-place operation may have resized it
        return out

    def _block(self, tensor: torch.Tensor, counted: bool, replaces: int | None = None) -> int:
        """Return the number of the tensor's storage, -1 on another device. A new storage counts with its size if
        `counted`, and never otherwise."""
        if self.device is not None and tensor.device.type != self.device:
            return -1
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        known = self._live.get(id(storage))
        if known is None:
            block = len(self._sizes)
            self._sizes.append(-1 if not counted else 0)  # -1: not ours to count
            self._made_in[block] = self._node()
            self._live[id(storage)] = (block, weakref.ref(storage, self._on_release(id(storage), block)))
        else:
            block = known[0]
        if self._sizes[block] not in (-1, size):
            self._change(block, size - self._sizes[block], replaces)
        return block

    def _node(self) -> int | None:
        node = torch._C._current_autograd_node()
        return None if node is None else node._sequence_nr()

    def _on_release(self, key: int, block: int) -> Callable[[Any], None]:
        tracker = weakref.ref(self)

        def release(_: Any) -> None:
            self = tracker()
            if self is not None:
                self._live.pop(key, None)
                if self._sizes[block] > 0:
                    self._change(block, -self._sizes[block])

        return release

    def _change(self, block: int, delta: int, replaces: int | None = None) -> None:
        self._sizes[block] += delta
        self.current_bytes += delta
        self._events.append(_Event(block, delta, replaces))


def _key(tensor: torch.Tensor) -> int:
    return id(tensor.untyped_storage())


def _sizes_after(events: list[_Event]) -> dict[int, int]:
    """Return the size that each block has after the events; empty blocks are left out."""
    sizes: dict[int, int] = {}
    for event in events:
        sizes[event.block] = sizes.get(event.block, 0) + event.delta
    return {block: size for block, size in sizes.items() if size}


def _in_place_sums(events: list[_Event]) -> list[_Event]:
    """Return the events with each sum that the engine makes in place put behind the release of its operand."""
    ordered = list(events)
    for i, event in enumerate(ordered[:-1]):
        following = ordered[i + 1]
        if event.replaces == following.block and following.delta == -event.delta:
            ordered[i], ordered[i + 1] = following, event
    return ordered
