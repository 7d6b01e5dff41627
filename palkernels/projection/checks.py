"""What must hold of audio_kv's arguments, and what makes them ready to run."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from palkernels import dtypes
from palkernels.arguments import PROJECTION, TURNS, Projection
from palkernels.dispatch import device_reasons
from palkernels.plans import Geometry, Plans, geometry

PER_LAYER = (*PROJECTION[1:], *TURNS)
OPTIONAL = PER_LAYER[3:]
PROJECTED = ("k_weight", "v_weight", "k_bias", "v_bias")  # of states' dtype; norms, cos and sin may have another
MAX_WIDTH = 65_536
MAX_HEAD_DIM = 1024


def in_lists(k_weight: Any) -> bool:
    """Whether every layer's weights are given at once."""
    return isinstance(k_weight, list | tuple)


def layers_of(
    states: Tensor, per_layer: dict[str, Any], numbers: dict[str, Any]
) -> tuple[list[Projection], list[Exception]]:
    """One Projection per layer, ready to run, and what is wrong with the arguments of :func:`palkernels.audio_kv`.

    Where anything is wrong, the layers are not to be used.
    """
    columns, problems = _columns(per_layer)
    problems += _number_problems(numbers)
    layers = []
    for position, values in enumerate(zip(*columns.values(), strict=True)):
        suffix = f"[{position}]" if in_lists(per_layer["k_weight"]) else ""
        tensors = dict(zip(PER_LAYER, values, strict=True))
        problems += _type_problems(states, tensors, suffix) or _shape_problems(states, tensors, numbers, suffix)
        if not problems:
            layers.append(_prepared(states, tensors, numbers))
    return layers, problems


_checked: Plans[bool] = Plans()


def seen(states: Any, per_layer: dict[str, Any], numbers: dict[str, Any], impl: str) -> Geometry | None:
    """The geometry of a call of :func:`palkernels.audio_kv`."""
    tensors, lengths = [states], []
    for value in per_layer.values():
        is_list = isinstance(value, list | tuple)
        tensors.extend(value if is_list else (value,))
        lengths.append(len(value) if is_list else None)
    tables = [table for name in TURNS for table in _as_list(per_layer[name])]
    turned = tuple([getattr(table, "requires_grad", None) for table in tables])
    return geometry(tensors, (*numbers.values(), impl, *lengths, *turned))


def is_checked(seen: Geometry | None) -> bool:
    """Whether a call of this geometry has been checked, and runs by Triton on its arguments as they are."""
    return seen is not None and _checked.get(seen) is not None


def keep_checked(
    seen: Geometry | None, states: Tensor, per_layer: dict[str, Any], layers: Sequence[Projection]
) -> None:
    """Let :func:`is_checked` know of a call without problems, unless its tensors had to be converted."""
    given = [states, *(x for name in PROJECTED for x in _as_list(per_layer[name]) if x is not None)]
    used = [layers[0].states, *(x for name in PROJECTED for layer in layers if (x := getattr(layer, name)) is not None)]
    if seen is not None and all(a is b for a, b in zip(given, used, strict=True)):
        _checked.keep(seen, True)


def checked_layers(states: Tensor, per_layer: dict[str, Any], numbers: dict[str, Any]) -> list[Projection]:
    """One Projection per layer, of arguments whose geometry :func:`is_checked`."""
    columns, _ = _columns(per_layer)
    checked_numbers = numbers | {name: float(numbers[name]) for name in ("eps", "norm_offset")}
    layers = []
    for values in zip(*columns.values(), strict=True):
        tensors: dict[str, Any] = dict(zip(PER_LAYER, values, strict=True))
        for name in TURNS:
            if tensors[name] is not None and tensors[name].ndim == 2:
                tensors[name] = tensors[name].unsqueeze(0)
        layers.append(Projection(states, **tensors, **checked_numbers))
    return layers


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def triton_reasons(states: Tensor, k_weight: Any, num_kv_heads: Any) -> list[str]:
    """Why the Triton kernels cannot take these states, and the first layer's weight, as far as the weight is valid."""
    reasons = device_reasons(states)
    if states.ndim == 3 and states.shape[-1] > MAX_WIDTH:
        reasons.append(f"d must be at most {MAX_WIDTH}, got {states.shape[-1]}")
    projected = k_weight.shape[0] if isinstance(k_weight, Tensor) and k_weight.ndim == 2 else 0
    head_dim = projected // num_kv_heads if isinstance(num_kv_heads, int) and num_kv_heads > 0 else 0
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"D must be at most {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


def _columns(per_layer: dict[str, Any]) -> tuple[dict[str, Sequence[Any]], list[Exception]]:
    """Each argument's values, one per layer; and what is wrong with the lists, in which case there are no values."""
    k_weight = per_layer["k_weight"]
    if not in_lists(k_weight):
        return {name: [per_layer[name]] for name in PER_LAYER}, []
    if not k_weight:
        return {}, [ValueError("k_weight must hold at least one layer, got an empty list")]
    columns: dict[str, Sequence[Any]] = {}
    problems: list[Exception] = []
    for name in PER_LAYER:
        value = per_layer[name]
        if (value is None and name in OPTIONAL) or (name in TURNS and isinstance(value, Tensor)):
            columns[name] = [value] * len(k_weight)
        elif not isinstance(value, list | tuple):
            problems.append(TypeError(f"{name} must be a list, as k_weight is, got {type(value).__name__}"))
        elif len(value) != len(k_weight):
            layers = f"k_weight's {len(k_weight)} layers"
            problems.append(ValueError(f"{name} must have an entry for each of {layers}, got {len(value)}"))
        else:
            columns[name] = value
    return ({} if problems else columns), problems


def _number_problems(numbers: dict[str, Any]) -> list[Exception]:
    problems: list[Exception] = []
    heads = numbers["num_kv_heads"]
    if isinstance(heads, bool) or not isinstance(heads, int):
        problems.append(TypeError(f"num_kv_heads must be an int, got {type(heads).__name__}"))
    elif heads < 1:
        problems.append(ValueError(f"num_kv_heads must be at least 1, got {heads}"))
    for name, least in (("eps", 0.0), ("norm_offset", -math.inf)):
        number = numbers[name]
        if isinstance(number, bool) or not isinstance(number, int | float):
            problems.append(TypeError(f"{name} must be a number, got {type(number).__name__}"))
        elif not (math.isfinite(number) and number >= least):
            problems.append(ValueError(f"{name} must be finite{' and at least 0' * (least == 0)}, got {number}"))
    return problems


def _type_problems(states: Tensor, tensors: dict[str, Any], suffix: str) -> list[Exception]:
    problems: list[Exception] = []
    labelled = {"states": states} | {f"{name}{suffix}": x for name, x in tensors.items() if x is not None}
    missing = [f"{name}{suffix}" for name in PER_LAYER if tensors[name] is None and name not in OPTIONAL]
    for label, tensor in labelled.items():
        if not isinstance(tensor, Tensor):
            problems.append(TypeError(f"{label} must be a tensor, got {type(tensor).__name__}"))
    problems += [TypeError(f"{label} must be a tensor, got NoneType") for label in missing]
    if problems:
        return problems
    for label, tensor in labelled.items():
        if tensor.dtype not in dtypes.FLOATS:
            problems.append(TypeError(f"{label} must be {dtypes.float_names()}, got {tensor.dtype}"))
        if tensor.device != states.device:
            problems.append(ValueError(f"{label} must be on states' device {states.device}, got {tensor.device}"))
    target = dtypes.computed_in(states, states.device)
    for name in PROJECTED:
        tensor = tensors[name]
        if tensor is not None and not problems and dtypes.computed_in(tensor, tensor.device) != target:
            problems.append(TypeError(f"{name}{suffix} must have states' dtype {states.dtype}, got {tensor.dtype}"))
    if (tensors["cos"] is None) != (tensors["sin"] is None):
        problems.append(TypeError(f"cos{suffix} and sin{suffix} must both be given or both be None"))
    for name in TURNS:
        if tensors[name] is not None and tensors[name].requires_grad:
            problems.append(ValueError(f"{name}{suffix} must not require gradients: none is computed for it"))
    return problems


def _shape_problems(states: Tensor, tensors: dict[str, Any], numbers: dict[str, Any], suffix: str) -> list[Exception]:
    problems: list[Exception] = []
    if states.ndim != 3 or states.shape[-1] < 1:
        return [ValueError(f"states must be (A, N, d), got shape {tuple(states.shape)}")]
    rows, tokens, width = states.shape
    k_weight, heads = tensors["k_weight"], numbers["num_kv_heads"]
    if k_weight.ndim != 2 or k_weight.shape[1] != width:
        got = tuple(k_weight.shape)
        return [ValueError(f"k_weight{suffix} must be (Hkv * D, d) with states' d = {width}, got shape {got}")]
    projected = k_weight.shape[0]
    if not isinstance(heads, int) or heads < 1:
        return []  # _number_problems says so
    if projected < heads or projected % heads:
        return [ValueError(f"k_weight{suffix} must have a multiple of num_kv_heads = {heads} rows, got {projected}")]
    head_dim = projected // heads
    expected = {
        "norm_weight": ((width,), "(d,)"),
        "v_weight": ((projected, width), "of k_weight's shape"),
        "k_bias": ((projected,), "(Hkv * D,)"),
        "v_bias": ((projected,), "(Hkv * D,)"),
        "k_norm_weight": ((head_dim,), "(D,)"),
    }
    for name, (shape, why) in expected.items():
        tensor = tensors[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(ValueError(f"{name}{suffix} must be {why} = {shape}, got shape {tuple(tensor.shape)}"))
    for name in TURNS:
        tensor = tensors[name]
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        leading = [(tokens,), (1, tokens), (rows, tokens)]
        turned = shape[-1] if shape else 0
        if shape[:-1] not in leading or turned % 2 or not 2 <= turned <= head_dim:
            problems.append(
                ValueError(
                    f"{name}{suffix} must be (N, R) or (A, N, R) with N = {tokens}, A = {rows} and R even, at most "
                    f"D = {head_dim}, got shape {shape}"
                )
            )
    if tensors["cos"] is not None and tensors["sin"] is not None and tensors["cos"].shape != tensors["sin"].shape:
        shapes = f"{tuple(tensors['cos'].shape)} and {tuple(tensors['sin'].shape)}"
        problems.append(ValueError(f"cos{suffix} and sin{suffix} must have one shape, got {shapes}"))
    return problems


def _prepared(states: Tensor, tensors: dict[str, Any], numbers: dict[str, Any]) -> Projection:
    """One layer made ready to run: autocast applied, cos and sin as (A or 1, N, R)."""
    target = dtypes.computed_in(states, states.device)
    ready: dict[str, Any] = {
        name: None if x is None else x.to(target) if name in PROJECTED else x for name, x in tensors.items()
    }
    for name in TURNS:
        table = ready[name]
        if table is not None and table.ndim == 2:
            ready[name] = table.unsqueeze(0)
    return Projection(
        states.to(target),
        **ready,
        num_kv_heads=numbers["num_kv_heads"],
        eps=float(numbers["eps"]),
        norm_offset=float(numbers["norm_offset"]),
    )
