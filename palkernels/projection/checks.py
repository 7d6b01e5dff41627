"""What must hold of audio_kv's arguments, and what makes them ready to run."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from palkernels.attention import checks
from palkernels.projection.call import PROJECTION, TURNS, Projection

PER_LAYER = (*PROJECTION[1:], *TURNS)
OPTIONAL = PER_LAYER[3:]
PROJECTED = ("k_weight", "v_weight", "k_bias", "v_bias")  # of states' dtype; norms, cos and sin may have another
MAX_WIDTH = 65_536
MAX_HEAD_DIM = 1024


def layers_of(states: Tensor, per_layer: dict[str, Any], numbers: dict[str, Any]) -> tuple[list[Projection], bool]:
    """One Projection per layer, ready to run, and whether lists were given.

    Raises:
        TypeError, ValueError: as :func:`palkernels.audio_kv`.
    """
    in_lists = isinstance(per_layer["k_weight"], list | tuple)
    columns = {name: _column(name, per_layer, in_lists) for name in PER_LAYER}
    problems = _number_problems(numbers)
    layers = []
    for position, values in enumerate(zip(*columns.values(), strict=True)):
        where = f"[{position}]" if in_lists else ""
        given = dict(zip(PER_LAYER, values, strict=True))
        found = _type_problems(states, given, where) or _shape_problems(states, given, numbers, where)
        problems += found
        if not problems:
            layers.append(_prepared(states, given, numbers))
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))
    return layers, in_lists


def triton_reasons(layers: list[Projection]) -> list[str]:
    """Why the Triton kernels cannot take arguments that are otherwise valid."""
    first = layers[0]
    reasons = checks.device_reasons(first.states)
    width, head_dim = first.states.shape[-1], first.head_dim
    if width > MAX_WIDTH:
        reasons.append(f"d must be at most {MAX_WIDTH}, got {width}")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"D must be at most {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


def _column(name: str, per_layer: dict[str, Any], in_lists: bool) -> Sequence[Any]:
    """One argument's value for each layer."""
    value = per_layer[name]
    if not in_lists:
        return [value]
    num_layers = len(per_layer["k_weight"])
    if num_layers == 0:
        raise ValueError("k_weight must hold at least one layer, got an empty list")
    if (value is None and name in OPTIONAL) or (name in TURNS and isinstance(value, Tensor)):
        return [value] * num_layers
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list, as k_weight is, got {type(value).__name__}")
    if len(value) != num_layers:
        raise ValueError(f"{name} must have an entry for each of k_weight's {num_layers} layers, got {len(value)}")
    return value


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


def _type_problems(states: Tensor, given: dict[str, Any], where: str) -> list[Exception]:
    problems: list[Exception] = []
    labelled = {"states": states} | {f"{name}{where}": x for name, x in given.items() if x is not None}
    missing = [f"{name}{where}" for name in PER_LAYER if given[name] is None and name not in OPTIONAL]
    for label, tensor in labelled.items():
        if not isinstance(tensor, Tensor):
            problems.append(TypeError(f"{label} must be a tensor, got {type(tensor).__name__}"))
    problems += [TypeError(f"{label} must be a tensor, got NoneType") for label in missing]
    if problems:
        return problems
    for label, tensor in labelled.items():
        if tensor.dtype not in checks.FLOAT_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in checks.FLOAT_DTYPES)
            problems.append(TypeError(f"{label} must be {known}, got {tensor.dtype}"))
        if tensor.device != states.device:
            problems.append(ValueError(f"{label} must be on states' device {states.device}, got {tensor.device}"))
    target = checks.autocast_dtype(states)
    for name in PROJECTED:
        tensor = given[name]
        if tensor is not None and not problems and checks.autocast_dtype(tensor) != target:
            problems.append(TypeError(f"{name}{where} must have states' dtype {states.dtype}, got {tensor.dtype}"))
    if (given["cos"] is None) != (given["sin"] is None):
        problems.append(TypeError(f"cos{where} and sin{where} must both be given or both be None"))
    for name in TURNS:
        if given[name] is not None and given[name].requires_grad:
            problems.append(ValueError(f"{name}{where} must not require gradients: none is computed for it"))
    return problems


def _shape_problems(states: Tensor, given: dict[str, Any], numbers: dict[str, Any], where: str) -> list[Exception]:
    problems: list[Exception] = []
    if states.ndim != 3 or states.shape[-1] < 1:
        return [ValueError(f"states must be (A, N, d), got shape {tuple(states.shape)}")]
    rows, tokens, width = states.shape
    k_weight, heads = given["k_weight"], numbers["num_kv_heads"]
    if k_weight.ndim != 2 or k_weight.shape[1] != width:
        got = tuple(k_weight.shape)
        return [ValueError(f"k_weight{where} must be (Hkv * D, d) with states' d = {width}, got shape {got}")]
    projected = k_weight.shape[0]
    if not isinstance(heads, int) or heads < 1:
        return []  # said already
    if projected < heads or projected % heads:
        return [ValueError(f"k_weight{where} must have a multiple of num_kv_heads = {heads} rows, got {projected}")]
    head_dim = projected // heads
    wanted = {
        "norm_weight": ((width,), "(d,)"),
        "v_weight": ((projected, width), "of k_weight's shape"),
        "k_bias": ((projected,), "(Hkv * D,)"),
        "v_bias": ((projected,), "(Hkv * D,)"),
        "k_norm_weight": ((head_dim,), "(D,)"),
    }
    for name, (shape, why) in wanted.items():
        tensor = given[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(ValueError(f"{name}{where} must be {why} = {shape}, got shape {tuple(tensor.shape)}"))
    for name in TURNS:
        tensor = given[name]
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        leading = [(tokens,), (1, tokens), (rows, tokens)]
        turned = shape[-1] if shape else 0
        if shape[:-1] not in leading or turned % 2 or not 2 <= turned <= head_dim:
            problems.append(
                ValueError(
                    f"{name}{where} must be (N, R) or (A, N, R) with N = {tokens}, A = {rows} and R even, at most "
                    f"D = {head_dim}, got shape {shape}"
                )
            )
    if given["cos"] is not None and given["sin"] is not None and given["cos"].shape != given["sin"].shape:
        shapes = f"{tuple(given['cos'].shape)} and {tuple(given['sin'].shape)}"
        problems.append(ValueError(f"cos{where} and sin{where} must have one shape, got {shapes}"))
    return problems


def _prepared(states: Tensor, given: dict[str, Any], numbers: dict[str, Any]) -> Projection:
    """Autocast applied, cos and sin as (A or 1, N, R)."""
    target = checks.autocast_dtype(states)
    tensors: dict[str, Any] = {
        name: None if x is None else x.to(target) if name in PROJECTED else x for name, x in given.items()
    }
    for name in TURNS:
        tensor = tensors[name]
        if tensor is not None and tensor.ndim == 2:
            tensors[name] = tensor.unsqueeze(0)
    return Projection(
        states.to(target),
        **tensors,
        num_kv_heads=numbers["num_kv_heads"],
        eps=float(numbers["eps"]),
        norm_offset=float(numbers["norm_offset"]),
    )
