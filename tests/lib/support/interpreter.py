"""Triton's interpreter, made quicker, stricter and more complete than it is."""

import builtins
import functools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from palkernels.attention import checks


def make_quick():
    """Leave out what takes most of the interpreter's time and changes no result.

    The sums and products with which it looks for overflows of 32-bit integers are two fifths of it. Outside of
    :func:`overflow_checks` nobody reads what they find: an assertion of theirs needs ``debug``, which is off.
    """
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch_language_once()
    numpy_dtype = interpreter._get_np_dtype  # makes a table at every call
    of_scalar = functools.cache(numpy_dtype)
    interpreter._get_np_dtype = lambda dtype: numpy_dtype(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)


def patch_language_once():
    """Patch ``triton.language`` for the device functions of a module at the first call of one, and not at every call.

    A launch patches and restores what its kernel's module sees; what a device function's module sees beyond that (of
    Triton's own it is ``triton.language.core``) the interpreter never restores. Patching takes two fifths of its time.
    """
    patched = set()

    def call(self, *arguments, **options):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


@contextmanager
def overflow_checks():
    """Raise where 32-bit integer arithmetic overflows, in live and masked lanes alike."""
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=True)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter.interpreter_builder, "options", options)
        yield


@contextmanager
def bfloat16():
    """Compute bfloat16 as a GPU does: products of exact float32 values, casts that round to nearest even.

    The interpreter keeps bfloat16 as the bits of an unsigned integer and multiplies those, so palkernels refuses it.
    """
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            values = torch.from_numpy(np.ascontiguousarray(source.data))
            bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return widened(source)
        return cast(self, source, target)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(builder, "create_dot", create_dot)
        patches.setattr(builder, "cast_impl", cast_impl)
        patches.setattr(checks, "triton_reasons", lambda call: [])
        yield


@contextmanager
def without_copies():
    """Do without the copy of every argument onto itself after a launch: it would touch all pages of a huge tensor."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        yield


@contextmanager
def only_programs(chosen):
    """Run only the chosen programs of every grid that has more than 65,535."""

    def programs(*args):
        return chosen if len(args) == 1 and args[0] > 65_535 else builtins.range(*args)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "range", programs, raising=False)
        yield


@contextmanager
def in_order(order):
    """Run the programs of a grid in the order into which ``order`` brings their numbers."""

    def programs(*args):
        return order(builtins.range(*args)) if len(args) == 1 else builtins.range(*args)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "range", programs, raising=False)
        yield
