"""The public functions: what must hold of their arguments, and which implementation runs."""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from palkernels import ops, reference, sdpa
from palkernels.call import Call

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "reference")
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
MAX_TRITON_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked for, not imported


def lal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    audio_lengths: Tensor | None = None,
    audio_index: Tensor | None = None,
    audio_visible_from: Tensor | None = None,
    text_start: Tensor | None = None,
    text_end: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Text queries attend to audio keys and, causally, to text keys, in one softmax.

    The attention of LAL ("PAL: Probing Audio Encoders via LLMs", arXiv 2506.10423): audio enters an LLM's
    self-attention as extra keys and values only. Nothing is concatenated. Differentiable in all five tensors.

    Query t of row b sits at key position ``p = text_end - T + t``, so the last query sits at ``text_end - 1``.
    It sees text key s iff ``text_start <= s <= p`` and, with a window, ``s > p - window``; it sees audio token j of
    audio row ``audio_index[b]`` iff ``j < audio_lengths`` and ``audio_visible_from[j] <= p``. The window counts
    text keys only. T = S = 4, N = 3, ``text_start = 1``, an audio length of 2, ``audio_visible_from = 2``::

              audio   text
        p=0   0 0 0   0 0 0 0     a query that sees nothing gives output 0, LSE -inf and gradients 0
        p=1   0 0 0   0 1 0 0
        p=2   1 1 0   0 1 1 0
        p=3   1 1 0   0 1 1 1

    Args:
        query: (B, Hq, T, D), float16, bfloat16, float32 or float64.
        key, value: (B, Hkv, S, D); S >= T and Hq a multiple of Hkv. Same dtype and device as query.
        audio_key, audio_value: (A, Hkv, N, D); N may be 0.
        audio_lengths: (A,) valid tokens of each audio row, 0 to N; None: all N.
        audio_index: (B,) the audio row that each text row reads; None: A == B, row for row.
        audio_visible_from: (B, N) first key position whose query sees the token; None: every query does.
        text_start: (B,) first valid text key (left padding); it may exceed text_end. None: 0.
        text_end: (B,) one past the last query's key, T to S (preallocated caches). None: S.
        scale: factor of the scores; None: D ** -0.5.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        window: each query sees at most this many text keys, itself included.
        return_lse: also return the log-sum-exp of the visible scores.
        impl: "triton", "sdpa" (PyTorch's fused kernels, any device), "reference" (the definition), or "auto":
            triton for CUDA tensors that it supports, sdpa otherwise. Triton takes CPU tensors iff
            TRITON_INTERPRET=1.

    Integer tensors may have any integer dtype. Their values are checked on CPU tensors; on CUDA only with
    PALKERNELS_CHECK=1, otherwise they are clamped there and nothing is read out of bounds. Keys and values that no
    query sees are never used and may hold anything.

    Returns:
        out (B, Hq, T, D) in query's dtype, contiguous as (B, T, Hq, D); with ``return_lse`` also the LSE
        (B, Hq, T), natural logarithm, float32 (float64 for float64 inputs), differentiable.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; or ``impl`` cannot run these inputs. Every reason is named.
    """
    call = Call(
        query, key, value, audio_key, audio_value,
        audio_lengths, audio_index, audio_visible_from, text_start, text_end, scale, softcap, window,
    )  # fmt: skip
    _check_impl(impl)
    problems = _problems(call)
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))
    call = _prepared(call)

    if impl == "auto":
        impl = "triton" if call.query.is_cuda and not _triton_reasons(call) else "sdpa"
    elif impl == "triton":
        reasons = _triton_reasons(call)
        if reasons:
            raise ValueError(f"impl='triton' cannot run: {'; '.join(reasons)}")
    out, lse = _RUN[impl](call)
    return (out, lse) if return_lse else out


def unsupported_reasons(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    audio_lengths: Tensor | None = None,
    audio_index: Tensor | None = None,
    audio_visible_from: Tensor | None = None,
    text_start: Tensor | None = None,
    text_end: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    impl: str = "triton",
) -> list[str]:
    """Why :func:`lal_attention` would raise on these arguments: every reason at once, invalid arguments included.

    An empty list says that ``impl`` runs them.
    """
    call = Call(
        query, key, value, audio_key, audio_value,
        audio_lengths, audio_index, audio_visible_from, text_start, text_end, scale, softcap, window,
    )  # fmt: skip
    _check_impl(impl)
    reasons = [str(problem) for problem in _problems(call)]
    if impl == "triton" and isinstance(query, Tensor):
        reasons += _triton_reasons(call if reasons else _prepared(call))
    return reasons


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")


def _problems(call: Call) -> list[Exception]:
    """Everything that is wrong with the arguments themselves; later checks only where earlier ones pass."""
    return _type_problems(call) or _shape_problems(call) or _value_problems(call)


def _type_problems(call: Call) -> list[Exception]:
    problems: list[Exception] = []
    tensors = {**call.floats(), **call.integers()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            problems.append(TypeError(f"{name} must be a tensor, got {type(tensor).__name__}"))
    if problems:
        return problems

    floats = call.floats()
    if call.query.dtype not in FLOAT_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        problems.append(TypeError(f"query must be {known}, got {call.query.dtype}"))
    elif len({dtype for _, dtype in _autocast_dtypes(call)}) > 1:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in floats.items())
        problems.append(TypeError(f"query, key, value, audio_key and audio_value must share one dtype, got {found}"))
    for name, tensor in call.integers().items():
        if tensor.dtype not in INTEGER_DTYPES:
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
    layouts = {
        "query": "(B, Hq, T, D)",
        "key": "(B, Hkv, S, D)",
        "value": "(B, Hkv, S, D)",
        "audio_key": "(A, Hkv, N, D)",
        "audio_value": "(A, Hkv, N, D)",
    }
    problems: list[Exception] = [
        ValueError(f"{name} must be {layouts[name]}, got shape {tuple(tensor.shape)}")
        for name, tensor in call.floats().items()
        if tensor.ndim != 4
    ]
    if problems:
        return problems

    batch, heads, num_queries, head_dim = call.query.shape
    kv_heads, num_keys = call.key.shape[1:3]
    audio_rows, num_audio = call.audio_key.shape[0], call.audio_key.shape[2]

    def want(name: str, shape: tuple[int, ...], why: str) -> None:
        got = tuple(getattr(call, name).shape)
        if got != shape:
            problems.append(ValueError(f"{name} must be {why} = {shape}, got shape {got}"))

    if head_dim < 1:
        problems.append(ValueError(f"query must have D >= 1, got shape {tuple(call.query.shape)}"))
    want("key", (batch, kv_heads, num_keys, head_dim), "(B, Hkv, S, D) with query's B and D")
    want("value", tuple(call.key.shape), "of key's shape")
    want("audio_key", (audio_rows, kv_heads, num_audio, head_dim), "(A, Hkv, N, D) with key's Hkv and D")
    want("audio_value", tuple(call.audio_key.shape), "of audio_key's shape")
    if kv_heads < 1 or heads % kv_heads:
        problems.append(ValueError(f"Hq must be a multiple of Hkv, got Hq={heads}, Hkv={kv_heads}"))
    if num_keys < num_queries:
        problems.append(ValueError(f"S must be at least T, got S={num_keys}, T={num_queries}"))
    if call.audio_index is None:
        if audio_rows != batch:
            problems.append(ValueError(f"without audio_index, A must equal B, got A={audio_rows}, B={batch}"))
    else:
        want("audio_index", (batch,), "(B,)")
        if batch and not audio_rows:
            problems.append(ValueError(f"audio_key must have a row for audio_index to name, got A=0, B={batch}"))
    if call.audio_lengths is not None:
        want("audio_lengths", (audio_rows,), "(A,)")
    if call.audio_visible_from is not None:
        want("audio_visible_from", (batch, num_audio), "(B, N)")
    for name in ("text_start", "text_end"):
        if getattr(call, name) is not None:
            want(name, (batch,), "(B,)")
    return problems


def _value_problems(call: Call) -> list[Exception]:
    on_cpu = call.query.device.type == "cpu"
    tracing = torch.compiler.is_compiling() or is_fake(call.query)
    if tracing or not (on_cpu or os.environ.get("PALKERNELS_CHECK") == "1"):
        return []
    num_queries, num_keys = call.query.shape[2], call.key.shape[2]
    audio_rows, num_audio = call.audio_key.shape[0], call.audio_key.shape[2]
    bounds = {
        "audio_lengths": (0, num_audio, "0 to N"),
        "audio_index": (0, audio_rows - 1, "0 to A - 1"),
        "text_start": (0, None, "at least 0"),
        "text_end": (num_queries, num_keys, "T to S"),
    }
    problems: list[Exception] = []
    for name, tensor in call.integers().items():
        if name not in bounds or not tensor.numel():
            continue
        least, most, why = bounds[name]
        low, high = (int(x) for x in torch.aminmax(_as_int64(tensor)))
        if low < least or (most is not None and high > most):
            allowed = f"{why} = {least} to {most}" if most is not None else why
            problems.append(ValueError(f"{name} must be {allowed}, got values from {low} to {high}"))
    return problems


def _autocast_dtypes(call: Call) -> list[tuple[str, torch.dtype]]:
    """The dtype each float tensor computes in: autocast's, if it is on; it leaves float64 alone, as SDPA does."""
    device = call.query.device.type
    target = None
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
    return [
        (name, tensor.dtype if target is None or tensor.dtype == torch.float64 else target)
        for name, tensor in call.floats().items()
    ]


def _prepared(call: Call) -> Call:
    """Autocast applied, integers as int32 or int64, the scale filled in."""
    changes: dict[str, object] = {}
    for name, dtype in _autocast_dtypes(call):
        changes[name] = getattr(call, name).to(dtype)
    for name, tensor in call.integers().items():
        if tensor.dtype not in (torch.int32, torch.int64):
            changes[name] = _as_int64(tensor)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else float(call.scale)
    softcap = None if call.softcap is None else float(call.softcap)
    # A window as long as the text hides nothing.
    window = None if call.window is None or call.window >= call.key.shape[2] else call.window
    return replace(call, scale=scale, softcap=softcap, window=window, **changes)  # type: ignore[arg-type]


def _as_int64(tensor: Tensor) -> Tensor:
    """uint64 values beyond int64 stay large: as a first visible position they mean never."""
    converted = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64:
        converted = torch.where(converted < 0, torch.iinfo(torch.int64).max, converted)
    return converted


def _triton_reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot take a call whose arguments are otherwise valid."""
    query = call.query
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton must be installed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        if query.dtype == torch.bfloat16:
            reasons.append("bfloat16 must not be used with TRITON_INTERPRET=1: the interpreter computes it wrongly")
    elif query.device.type != "cuda":
        reasons.append(f"tensors must be on a CUDA device (or TRITON_INTERPRET=1 set), got {query.device}")
    else:
        if torch.version.hip is not None:
            reasons.append("the device must be an NVIDIA GPU: ROCm is not supported yet")
        elif torch.cuda.get_device_capability(query.device) < MIN_CAPABILITY:
            capability = ".".join(map(str, torch.cuda.get_device_capability(query.device)))
            reasons.append(f"the GPU must have compute capability 8.0 or more, got {capability}")
        if query.dtype == torch.float64:
            reasons.append("float64 must be run with TRITON_INTERPRET=1 or another implementation")
    if query.ndim == 4 and query.shape[-1] > MAX_TRITON_HEAD_DIM:
        reasons.append(f"D must be at most {MAX_TRITON_HEAD_DIM}, got {query.shape[-1]}")
    return reasons


def _clamped(call: Call) -> Call:
    """Unchecked integers within bounds, on devices where they may be wrong; the Triton kernels do so themselves."""
    if call.query.device.type == "cpu":
        return call
    audio_rows, num_audio = call.audio_key.shape[0], call.audio_key.shape[2]
    bounds = {
        "audio_lengths": (0, num_audio),
        "audio_index": (0, audio_rows - 1),
        "text_end": (call.query.shape[2], call.key.shape[2]),
    }
    given = call.integers()
    changes = {name: given[name].clamp(*limits) for name, limits in bounds.items() if name in given}
    return replace(call, **changes)  # type: ignore[arg-type]


def _run_triton(call: Call) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        # Where no input requires a gradient, PyTorch would drop the tangents without a word.
        unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
        dual = [name for name, tensor in call.floats().items() if unpack(tensor).tangent is not None]
        if dual:
            raise NotImplementedError(f"impl='triton' must not be given forward-mode tangents, got them for {dual}")
    out, lse = ops.lal_forward(*call.arguments())
    return out, lse


def _run_sdpa(call: Call) -> tuple[Tensor, Tensor]:
    call = _clamped(call)
    return sdpa.lal_attention(*call.floats().values(), settings=sdpa.Settings(**call.options()))


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    call = _clamped(call)
    result = reference.lal_attention(*call.floats().values(), **call.options(), return_lse=True)
    assert isinstance(result, tuple)
    return result


_RUN = {"triton": _run_triton, "sdpa": _run_sdpa, "reference": _run_reference}
