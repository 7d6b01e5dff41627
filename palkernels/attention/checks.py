"""What must hold of a call's arguments, and what makes it ready to run. Nothing here launches anything."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from palkernels import devices, dtypes
from palkernels.arguments import FLOATS, PACKING, Call
from palkernels.attention import scales
from palkernels.dispatch import device_reasons, eight_bit_reasons, values_are_checked

MAX_TRITON_HEAD_DIM = 256
LAYOUTS = {
    "query": "(B, Hq, T, D)",
    "key": "(B, Hkv, S, D)",
    "value": "(B, Hkv, S, D)",
    "audio_key": "(A, Hkv, N, D)",
    "audio_value": "(A, Hkv, N, D)",
}
PACKED_LAYOUTS = {
    "query": "(sum T, Hq, D)",
    "key": "(sum T, Hkv, D)",
    "value": "(sum T, Hkv, D)",
    "audio_key": "(sum N, Hkv, D)",
    "audio_value": "(sum N, Hkv, D)",
    "cu_seqlens": "(B + 1,)",
    "cu_audio": "(A + 1,)",
}


def problems_of(call: Call) -> list[Exception]:
    """What is wrong with the arguments of a call, whatever runs them.

    Shapes are looked at where all types are right, values where all shapes are.
    """
    return _type_problems(call) or _shape_problems(call) or _value_problems(call)


def packed_problems_of(call: Call) -> list[Exception]:
    """What is wrong with the arguments of :func:`palkernels.lal_attention_varlen`, which are (tokens, heads, D)."""
    missing = [name for name in PACKING if getattr(call, name) is None]
    problems: list[Exception] = [TypeError(f"{name} must be a tensor, got NoneType") for name in missing]
    for name in ("max_seqlen", "max_audio"):
        number = getattr(call, name)
        if isinstance(number, bool) or not isinstance(number, int):
            problems.append(TypeError(f"{name} must be an int, got {type(number).__name__}"))
        elif number < 0:
            problems.append(ValueError(f"{name} must be at least 0, got {number}"))
    return problems or problems_of(call)


def _type_problems(call: Call) -> list[Exception]:
    problems: list[Exception] = []
    tensors = {**call.floats(), **call.integers(), **call.scales()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            problems.append(TypeError(f"{name} must be a tensor, got {type(tensor).__name__}"))
    if problems:
        return problems

    # Audio in eight bits has scales in place of query's dtype.
    sharing = FLOATS[:3] if scales.has_eight_bits(call) else FLOATS
    floats = {name: getattr(call, name) for name in sharing}
    if call.query.dtype not in dtypes.FLOATS:
        problems.append(TypeError(f"query must be {dtypes.float_names()}, got {call.query.dtype}"))
    elif len({dtypes.computed_in(tensor, call.query.device) for tensor in floats.values()}) > 1:
        got = ", ".join(f"{name} {tensor.dtype}" for name, tensor in floats.items())
        names = f"{', '.join(sharing[:-1])} and {sharing[-1]}"
        problems.append(TypeError(f"{names} must share one dtype, got {got}"))
    problems += scales.type_problems(call)
    for name, tensor in call.integers().items():
        if tensor.dtype not in dtypes.INTEGERS:
            problems.append(TypeError(f"{name} must have an integer dtype, got {tensor.dtype}"))
    for name, tensor in tensors.items():
        if tensor.device != call.query.device:
            problems.append(ValueError(f"{name} must be on query's device {call.query.device}, got {tensor.device}"))

    for name in ("scale", "softcap"):
        number = getattr(call, name)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            problems.append(TypeError(f"{name} must be a number or None, got {type(number).__name__}"))
        elif not -math.inf < number < math.inf:  # as torch.compile can trace it
            problems.append(ValueError(f"{name} must be finite, got {number}"))
        elif name == "softcap" and number <= 0:
            problems.append(ValueError(f"softcap must be positive, got {number}"))
    if call.window is not None:
        if isinstance(call.window, bool) or not isinstance(call.window, int):
            problems.append(TypeError(f"window must be an int or None, got {type(call.window).__name__}"))
        elif call.window < 1:
            problems.append(ValueError(f"window must be at least 1, got {call.window}"))
    return problems


def _shape_problems(call: Call) -> list[Exception]:
    """What is wrong with the shapes, packed or not: in both layouts axis 1 counts heads, and the last axis is D."""
    is_packed = call.cu_seqlens is not None
    problems: list[Exception] = []
    for name, layout in (PACKED_LAYOUTS if is_packed else LAYOUTS).items():
        shape = tuple(getattr(call, name).shape)
        rank = 1 if name in PACKING else layout.count(",") + 1
        if len(shape) != rank or (name in PACKING and not shape[0]):
            problems.append(ValueError(f"{name} must be {layout}, got shape {shape}"))
    if problems:
        return problems

    def expect(name: str, shape: tuple[int, ...], why: str) -> None:
        tensor = getattr(call, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(ValueError(f"{name} must be {why} = {shape}, got shape {tuple(tensor.shape)}"))

    heads, kv_heads, head_dim = call.query.shape[1], call.key.shape[1], call.query.shape[-1]
    batch, audio_rows = call.num_batches, call.num_audio_rows
    if head_dim < 1:
        problems.append(ValueError(f"query must have D >= 1, got shape {tuple(call.query.shape)}"))
    if is_packed:
        audio_tokens = call.audio_key.shape[0]
        expect("key", (call.query.shape[0], kv_heads, head_dim), "(sum T, Hkv, D) with query's tokens and D")
        expect("audio_key", (audio_tokens, kv_heads, head_dim), "(sum N, Hkv, D) with key's Hkv and D")
        expect("audio_visible_from", (audio_tokens,), "(sum N,)")
    else:
        num_queries, num_keys, num_audio = call.query.shape[2], call.key.shape[2], call.audio_key.shape[2]
        expect("key", (batch, kv_heads, num_keys, head_dim), "(B, Hkv, S, D) with query's B and D")
        expect("audio_key", (audio_rows, kv_heads, num_audio, head_dim), "(A, Hkv, N, D) with key's Hkv and D")
        expect("audio_lengths", (audio_rows,), "(A,)")
        expect("audio_key_scale", (audio_rows, kv_heads), "(A, Hkv)")
        expect("audio_value_scale", (audio_rows, kv_heads), "(A, Hkv)")
        expect("audio_visible_from", (batch, num_audio), "(B, N)")
        expect("text_start", (batch,), "(B,)")
        expect("text_end", (batch,), "(B,)")
        if num_keys < num_queries:
            problems.append(ValueError(f"S must be at least T, got S={num_keys}, T={num_queries}"))
    expect("value", tuple(call.key.shape), "of key's shape")
    expect("audio_value", tuple(call.audio_key.shape), "of audio_key's shape")
    expect("audio_index", (batch,), "(B,)")
    if kv_heads < 1 or heads % kv_heads:
        problems.append(ValueError(f"Hq must be a multiple of Hkv, got Hq={heads}, Hkv={kv_heads}"))
    if call.audio_index is None and audio_rows != batch:
        problems.append(ValueError(f"without audio_index, A must equal B, got A={audio_rows}, B={batch}"))
    if call.audio_index is not None and batch and not audio_rows:
        source = "cu_audio" if is_packed else "audio_key"
        problems.append(ValueError(f"{source} must have a row for audio_index to name, got A=0, B={batch}"))
    if is_packed and call.audio_index is not None and call.audio_visible_from is not None:
        problems.append(ValueError("audio_visible_from must not be given with audio_index, got both"))
    return problems


def _value_problems(call: Call) -> list[Exception]:
    if not values_are_checked(call.query):
        return []
    ranges: dict[str, tuple[int, int | None, str]] = {"audio_index": (0, call.num_audio_rows - 1, "0 to A - 1")}
    if call.cu_seqlens is not None:
        return _packing_problems(call) + _range_problems(call, ranges)
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    ranges |= {
        "audio_lengths": (0, call.audio_key.shape[2], "0 to N"),
        "text_start": (0, None, "at least 0"),
        "text_end": (num_queries, num_keys, "T to S"),
    }
    return _range_problems(call, ranges) + scales.value_problems(call)


def _range_problems(call: Call, ranges: dict[str, tuple[int, int | None, str]]) -> list[Exception]:
    """Values out of range; ``ranges`` has each tensor's least and largest value (None: any), and the words for both."""
    problems: list[Exception] = []
    for name, tensor in call.integers().items():
        if name not in ranges or not tensor.numel():
            continue
        least, most, why = ranges[name]
        low, high = (int(x) for x in torch.aminmax(_as_int64(tensor)))
        if low < least or (most is not None and high > most):
            allowed = f"{why} = {least} to {most}" if most is not None else why
            problems.append(ValueError(f"{name} must be {allowed}, got values from {low} to {high}"))
    return problems


def _packing_problems(call: Call) -> list[Exception]:
    """What is wrong with the values of ``cu_seqlens`` and ``cu_audio``, and with the longest rows."""
    problems: list[Exception] = []
    packings = (("cu_seqlens", "sum T", call.query, "max_seqlen"), ("cu_audio", "sum N", call.audio_key, "max_audio"))
    for name, total, tensor, limit in packings:
        cumulative = _as_int64(getattr(call, name))
        first, last, lengths = int(cumulative[0]), int(cumulative[-1]), cumulative.diff().tolist()
        if (first, last) != (0, tensor.shape[0]):
            problems.append(ValueError(f"{name} must run from 0 to {total} = {tensor.shape[0]}, got {first} to {last}"))
        elif lengths and min(lengths) < 0:
            problems.append(ValueError(f"{name} must not decrease, got a row of {min(lengths)} tokens"))
        elif lengths and max(lengths) > getattr(call, limit):
            longest, got = max(lengths), getattr(call, limit)
            problems.append(ValueError(f"{limit} must be at least the longest row's {longest}, got {got}"))
    return problems


def prepared(call: Call) -> Call:
    """A call without problems, made ready to run: autocast applied, integers as int32 or int64, the scale filled in."""
    changes: dict[str, object] = {}
    for name, tensor in call.floats().items():
        dtype = dtypes.computed_in(tensor, call.query.device)
        if tensor.dtype != dtype:
            changes[name] = tensor.to(dtype)
    for name, tensor in call.integers().items():
        if tensor.dtype not in (torch.int32, torch.int64):
            changes[name] = _as_int64(tensor)
    if not isinstance(call.scale, float):
        changes["scale"] = call.query.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
    if call.softcap is not None:
        changes["softcap"] = float(call.softcap)
    if call.window is not None and call.window >= call.num_keys:  # as long as the text: it hides nothing
        changes["window"] = None
    return replace(call, **changes) if changes else call  # type: ignore[arg-type]


def _as_int64(tensor: Tensor) -> Tensor:
    """The integers as int64. A uint64 beyond its range stays large: as a first visible position it means never."""
    converted = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64:
        converted = torch.where(converted < 0, torch.iinfo(torch.int64).max, converted)
    return converted


def triton_reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot take a call, packed or not, whose arguments are otherwise valid."""
    query = call.query
    reasons = device_reasons(query)
    if query.ndim and query.shape[-1] > MAX_TRITON_HEAD_DIM:
        reasons.append(f"D must be at most {MAX_TRITON_HEAD_DIM}, got {query.shape[-1]}")
    return reasons + eight_bit_reasons(query) if scales.has_eight_bits(call) else reasons


def clamped(call: Call) -> Call:
    """The call with its integers clamped to their bounds on devices where nothing has checked them.

    The Triton kernels clamp for themselves, and packed rows are clamped one by one.
    """
    if devices.is_host(call.query.device) or call.cu_seqlens is not None:
        return call
    audio_rows, num_audio = call.audio_key.shape[0], call.audio_key.shape[2]
    bounds = {
        "audio_lengths": (0, num_audio),
        "audio_index": (0, audio_rows - 1),
        "text_end": (call.query.shape[2], call.key.shape[2]),
    }
    integers = call.integers()
    changes = {name: integers[name].clamp(*limits) for name, limits in bounds.items() if name in integers}
    return replace(call, **changes)  # type: ignore[arg-type]
