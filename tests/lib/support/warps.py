"""The hardware under `support.gluon`: partitions as threads in a random order, shared memory, barriers, products.

What a GPU would not report raises a `KernelError`: an access to shared memory that no barrier orders behind those
before it, found by vector clocks, so in any order of events (FastTrack, doi.org/10.1145/1542476.1542490); a product
that reads what was copied without a fence between them, or whose operand in registers is given up before it has ended;
more arrivals than a barrier counts; a wait that never ends. What has not landed or has not been waited for is NaN.
"""

import random
import threading
from collections import deque
from types import SimpleNamespace

import torch

UNKNOWN = float("inf")  # the time of what has not ended
here = threading.local()  # whose partition the thread is


class KernelError(Exception):
    """What the kernel must not do."""


class Stopped(BaseException):
    """Another partition has failed."""


class Clock(dict):
    """How far each agent, a partition or its copies, is known to have come."""

    def join(self, other):
        self.update({agent: max(self.get(agent, 0), time) for agent, time in other.items()})

    def knows(self, event):
        agent, time = event
        return self.get(agent, 0) >= time


class Partition:
    """A group of warps, and the copies that it has begun, in their order."""

    def __init__(self, name, warps, machine, clock=()):
        self.name, self.threads, self.machine = name, 32 * warps, machine
        self.clock = Clock(clock)
        self.clock[name] = 1
        self.fenced = Clock()  # what it knew at its last fence
        self.products = []  # in flight
        self.copies, self.copied = deque(), 0
        self.turn = threading.Semaphore(0)
        self.waits_for, self.waits_until, self.ended = "", None, False

    def release(self):
        """What it knows now; what it does next is later."""
        known = Clock(self.clock)
        self.clock[self.name] += 1
        return known

    def pause(self, until=None, what=""):
        """Let others go on, at least until a condition holds."""
        if not self.machine.concurrent:
            assert until is None or until()
            return
        self.waits_until, self.waits_for = until, what
        self.machine.turn.release()
        self.turn.acquire()
        if self.machine.stopped:
            raise Stopped

    @property
    def ready(self):
        return not self.ended and (self.waits_until is None or self.waits_until())

    def land(self):
        self.copies.popleft()()


class Slot:
    """One stage of a buffer in shared memory."""

    def __init__(self, name, dtype, shape):
        self.name, self.dtype, self.shape = name, dtype, tuple(shape)
        self.values = torch.full(self.shape, torch.nan, dtype=dtype)
        self.written, self.reads = None, {}

    def begin_write(self, by):
        for event in filter(None, (self.written, *self.reads.items())):
            if not by.clock.knows(event):
                raise KernelError(f"{self.name} must be free before {by.name} copies to it, got {event[0]} still at it")
        self.values.fill_(torch.nan)
        self.written, self.reads = (f"{by.name}'s copies", UNKNOWN), {}

    def begin_read(self, by):
        if self.written is None or not by.clock.knows(self.written):
            raise KernelError(f"{self.name} must be ready before {by.name} reads it")
        if not by.fenced.knows(self.written):
            raise KernelError(
                f"{self.name} must be read by a product of {by.name} after a fence, got none since it was ready"
            )
        self.reads[by.name] = UNKNOWN

    def end_read(self, by):
        self.reads[by.name] = by.clock[by.name]

    def permute(self, order):
        assert tuple(order) == (1, 0)
        return SimpleNamespace(slot=self, dtype=self.dtype, shape=self.shape[::-1])


class Barrier:
    def __init__(self, name):
        self.name, self.count, self.pending, self.completed = name, None, None, 0
        self.gathered, self.published = Clock(), Clock()

    def arrive(self, known, arrivals):
        self.pending -= arrivals
        if self.pending < 0:
            raise KernelError(f"{self.name} must have {self.count} arrivals a phase, got more")
        self.gathered.join(known)
        if self.pending == 0:
            self.completed, self.pending = self.completed + 1, self.count
            self.published.join(self.gathered)
            self.gathered = Clock()


class Stages(list):
    def index(self, stage):
        assert 0 <= int(stage) < len(self)
        return self[int(stage)]


class Product:
    """An asynchronous product; its operands in shared memory are read until it has been waited for."""

    def __init__(self, by, left, right, accumulator):
        self.by, self.left, self.right, self.accumulator, self.result = by, left, right, accumulator, None
        self.slots = [getattr(x, "slot", x) for x in (left, right) if not isinstance(x, torch.Tensor)]
        for slot in self.slots:
            slot.begin_read(by)

    def end(self):
        left = self.left if isinstance(self.left, torch.Tensor) else self.left.values
        right = self.right.slot.values.T if isinstance(self.right, SimpleNamespace) else self.right.values
        assert left.dtype == right.dtype
        assert self.accumulator.dtype == torch.float32
        self.result = left.float() @ right.float() + self.accumulator
        for slot in self.slots:
            slot.end_read(self.by)

    @property
    def value(self):
        return torch.full_like(self.accumulator, torch.nan) if self.result is None else self.result


class Machine:
    """One program."""

    def __init__(self, program, seed):
        self.program, self.choose = program, random.Random(f"{program} {seed}")
        self.allocations, self.stopped, self.concurrent, self.fault = 0, False, False, None
        self.turn = threading.Semaphore(0)

    def run(self, kernel, arguments):
        here.partition = Partition("the start", 4, self)
        kernel(*arguments)

    def specialise(self, functions, warps, registers):
        assert len(warps) == len(registers) == len(functions) - 1
        start = here.partition
        self.concurrent = True
        partitions = [Partition(f"partition {i}", n, self, start.release()) for i, n in enumerate((4, *warps))]
        threads = [
            threading.Thread(target=self._work, args=(partition, *work), daemon=True)
            for partition, work in zip(partitions, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            self._schedule(partitions)
        finally:
            self.stopped = True
            for partition, thread in zip(partitions, threads, strict=True):
                partition.turn.release()
                thread.join()

    def _schedule(self, partitions):
        while not all(x.ended for x in partitions):
            steps = [partition.land for partition in partitions if partition.copies]
            steps += [partition for partition in partitions if partition.ready]
            if not steps:
                waits = ", ".join(f"{x.name} for {x.waits_for}" for x in partitions if not x.ended)
                raise KernelError(f"a wait must end, got {waits}")
            step = self.choose.choice(steps)
            if isinstance(step, Partition):
                step.turn.release()
                self.turn.acquire()
            else:
                step()
            if self.fault is not None:
                raise self.fault
        for partition in partitions:
            if partition.products or partition.copies:
                raise KernelError(f"{partition.name} must wait for all that it has begun")

    def _work(self, partition, function, arguments):
        here.partition = partition
        partition.turn.acquire()
        try:
            if not self.stopped:
                function(*arguments)
        except Stopped:
            pass
        except Exception as error:
            self.fault = error
        finally:
            partition.ended = True
            self.turn.release()
