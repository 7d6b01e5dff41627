"""The calls whose host time `palkernels microbench --host` measures, and the process that measures them.

    python -m palkernels.bench.kernels.host_calls DEVICE SECONDS

DEVICE is stand-in, cuda or cuda:INDEX. It writes lines of JSON: {"doing": text, "done": share} as it goes on, and at
last the document, or {"error": text} where a user can mend what is wrong.

On the stand-in a call of lal_attention has the shape that it has on a GPU: its kernels do not run. PyTorch's own
operations do run there, on the CPU. So what is made of them, SDPA and audio's projections, gets tensors so small that
computing vanishes, float32 for SDPA, and its time is that of its dispatch on a CPU: how many dimensions and operations
there are decides it, not how large they are. It is less than on a GPU, for which SDPA chooses among more kernels, and
allocates and launches more: the peers' times are lower bounds there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palkernels import plans
from palkernels.bench.errors import UserError
from palkernels.bench.instruments import stand_in
from palkernels.bench.instruments.host_time import Batch, Call, HostTime, host_times
from palkernels.bench.options import dtype_name

__all__ = ["IMPLEMENTATIONS", "OPS", "OURS", "STAND_IN", "Row", "Shape", "rows"]

STAND_IN = "stand-in"
OPS = ("forward", "decode", "forward_with_gradients", "backward", "audio_kv")
OURS, FIRST, GROWN = "palkernels", "palkernels (first)", "palkernels (grown)"
SDPA, CAT_SDPA, EAGER = "sdpa", "cat + sdpa", "eager"
LAYERS, ALL_LAYERS = 16, " (all layers)"
IMPLEMENTATIONS = {
    OURS: "lal_attention or audio_kv, a call like the one before it",
    FIRST: "the same, with all kept launches forgotten before: checked, bound by Triton, and kept",
    GROWN: "the text's keys and values have one token more than in the call before, and so other strides",
    SDPA: "F.scaled_dot_product_attention on the text alone",
    CAT_SDPA: "the same after audio and text were concatenated",
    EAGER: "RMSNorm, Linear and RoPE in PyTorch; on a CPU RMSNorm is several operations, on a GPU one",
    OURS + ALL_LAYERS: f"{LAYERS} layers by one call of audio_kv",
    EAGER + ALL_LAYERS: f"{LAYERS} layers, one after the other",
}
WITH_GRADIENTS = ("forward_with_gradients", "backward")
LONGEST = 8192  # text keys that a growing cache reaches before it starts anew: more than any cache of plans holds
LIMITS = (
    *stand_in.LIMITS,
    "so SDPA, eager and audio_kv have tensors there so small that computing vanishes",
    "what is left of SDPA, a CPU's dispatch, is a lower bound of a GPU's, which chooses, allocates and launches more",
)


@dataclass(frozen=True)
class Shape:
    """What a call is about: `queries` of each text on `keys` of the text and `audio` tokens."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    audio: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    layers: int = 1


PREFILL = Shape(batch=4, heads=32, kv_heads=8, queries=16, keys=16, audio=200, head_dim=64)  # Llama 3.2 1B
DECODE = replace(PREFILL, queries=1, keys=128)
SMALL = Shape(batch=1, heads=4, kv_heads=1, queries=2, keys=2, audio=1, head_dim=8, dtype=torch.float32)
SMALL_DECODE = replace(SMALL, queries=1, keys=1)
SMALL_PROJECTION = Shape(batch=1, heads=1, kv_heads=1, queries=1, keys=1, audio=2, head_dim=32)


@dataclass(frozen=True)
class Row:
    """One implementation of one operation."""

    op: str
    implementation: str
    shape: Shape
    batch: Batch
    backend: str | None = None  # that SDPA takes


def rows(device: torch.device, on_stand_in: bool) -> Iterator[Row]:
    """Yield what is measured, operation by operation."""
    from palkernels import lal_attention

    small, small_decode = (SMALL, SMALL_DECODE) if on_stand_in else (PREFILL, DECODE)
    for op, full, peers in (
        ("forward", PREFILL, small), ("decode", DECODE, small_decode),
        ("forward_with_gradients", PREFILL, small), ("backward", PREFILL, small),
    ):  # fmt: skip
        tensors = _inputs(full, device, op)
        for name in (OURS, FIRST):
            call: Call = partial(lal_attention, *tensors, impl="triton")
            yield Row(op, name, full, _batches(op, call, tensors, forgets=name == FIRST))
        if op == "decode":
            yield Row(op, GROWN, full, _growing(full, device))
        yield from _sdpa(op, peers, device, on_stand_in)
    for layers, suffix in ((1, ""), (LAYERS, ALL_LAYERS)):
        shape = replace(SMALL_PROJECTION if on_stand_in else DECODE, layers=layers)
        for name, call in _projections(shape, device).items():
            yield Row("audio_kv", name + suffix, shape, _batches("audio_kv", call))
            if name + suffix == OURS:
                yield Row("audio_kv", FIRST, shape, _batches("audio_kv", call, forgets=True))


def _inputs(shape: Shape, device: torch.device, op: str) -> list[Tensor]:
    """Return query, key, value, audio key and audio value as a model's layers lay them out: in decoding, text's keys
    and values come from a cache, which concatenates heads first."""

    def heads_first(heads: int, tokens: int, cached: bool = False) -> Tensor:
        values = torch.randn(shape.batch, tokens, heads, shape.head_dim, dtype=shape.dtype, device=device)
        values = values.transpose(1, 2)
        return (values.contiguous() if cached else values).requires_grad_(op in WITH_GRADIENTS)

    query = heads_first(shape.heads, shape.queries)
    text = [heads_first(shape.kv_heads, shape.keys, cached=op == "decode") for _ in range(2)]
    return [query, *text, *(heads_first(shape.kv_heads, shape.audio) for _ in range(2))]


def _batches(op: str, forward: Call, leaves: list[Tensor] | None = None, forgets: bool = False) -> Batch:
    """Return what makes calls of an operation, with gradients switched on where the operation has some.

    `forgets`: each call forgets first what the library keeps of the ones before.
    """
    backward: list[Call] = []
    if forgets and op != "backward":
        forward = partial(_forgetting, forward)

    def batch(count: int) -> list[Call]:
        torch.set_grad_enabled(op in WITH_GRADIENTS)
        if op != "backward":
            return [forward] * count
        if not backward:  # after the forward pass, which runs once
            out: Any = forward()
            call = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
            backward.append(partial(_forgetting, call) if forgets else call)
        return backward * count

    return batch


def _forgetting(call: Call) -> Any:
    plans.forget_all()
    return call()


def _growing(shape: Shape, device: torch.device) -> Batch:
    """Return what makes decoding calls, each with a token more than the one before it."""
    from palkernels import lal_attention

    query, *_, audio_key, audio_value = _inputs(shape, device, "decode")
    size = shape.batch * shape.kv_heads * LONGEST * shape.head_dim
    memory = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2)]
    keys = shape.keys

    def batch(count: int) -> list[Call]:
        nonlocal keys
        torch.set_grad_enabled(False)
        calls: list[Call] = []
        for _ in range(count):
            keys = keys + 1 if keys < LONGEST else shape.keys
            grown = (shape.batch, shape.kv_heads, keys, shape.head_dim)
            strides = (shape.kv_heads * keys * shape.head_dim, keys * shape.head_dim, shape.head_dim, 1)
            key, value = (flat.as_strided(grown, strides) for flat in memory)
            calls.append(partial(lal_attention, query, key, value, audio_key, audio_value, impl="triton"))
        return calls

    return batch


def _sdpa(op: str, shape: Shape, device: torch.device, on_stand_in: bool) -> Iterator[Row]:
    """Yield SDPA on the text, and on audio and text concatenated."""
    tensors = _inputs(shape, device, op)
    query, key, value, audio_key, audio_value = tensors
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)

    def concatenated() -> tuple[Tensor, Tensor]:
        return torch.cat([audio_key, key], dim=2), torch.cat([audio_value, value], dim=2)

    mask = _mask(shape.queries, shape.keys, on_stand_in)
    call = partial(attend, query, key, value, **mask)
    yield Row(op, SDPA, shape, _batches(op, call, tensors[:3]), _backend(query, key, value, mask))
    mask = _mask(shape.queries, shape.keys + shape.audio, on_stand_in)
    backend = _backend(query, *concatenated(), mask)
    yield Row(op, CAT_SDPA, shape, _batches(op, lambda: attend(query, *concatenated(), **mask), tensors), backend)


def _mask(queries: int, keys: int, on_stand_in: bool) -> dict[str, Any]:
    """Return the options for a causal mask aligned at the lower right; on the stand-in those for the upper left, as the
    other way would compute a mask there."""
    if queries == 1:
        return {}
    if queries == keys or on_stand_in:
        return {"is_causal": True}
    from torch.nn.attention.bias import causal_lower_right

    return {"attn_mask": causal_lower_right(queries, keys)}


def _backend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> str:
    """Return the name of the backend that SDPA takes."""
    if "attn_mask" in options:  # PyTorch's causal bias asks for flash itself
        parameters: Any = torch.backends.cuda.SDPAParams
        if torch.backends.cuda.can_use_flash_attention(parameters(query, key, value, None, 0.0, False, True)):
            return "FLASH_ATTENTION"
    plain = {"is_causal": options.get("is_causal", False), "enable_gqa": True}
    choice = torch._fused_sdp_choice(query, key, value, **plain)
    return str(torch.nn.attention.SDPBackend(choice).name)


def _projections(shape: Shape, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return audio_kv of one layer or of all, and the same in PyTorch."""
    from palkernels import audio_kv
    from palkernels.bench.kernels.cases import EPS, Case
    from palkernels.bench.kernels.peers import PEERS

    case = Case(
        "audio_kv", "", shape.batch, shape.heads, shape.kv_heads, 1, shape.audio, shape.head_dim, shape.layers,
        shape.dtype, device,
    )  # fmt: skip
    lists = case.inputs(0)
    ours = lists
    if shape.layers == 1:
        ours = {name: value[0] if isinstance(value, list) else value for name, value in lists.items()}
    eager = next(peer for peer in PEERS if peer.key == "eager").prepare(case)
    return {
        OURS: partial(audio_kv, **ours, num_kv_heads=shape.kv_heads, eps=EPS, impl="triton"),
        EAGER: partial(eager, lists),
    }


def measure(name: str, seconds: float, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure every row on a device, and return the document's rows and what they were measured on."""
    on_stand_in = name == STAND_IN
    if on_stand_in:
        stand_in.enter()
    device = torch.device("cpu" if on_stand_in else name)
    wait: Call = (lambda: None) if on_stand_in else partial(torch.cuda.synchronize, device)
    if not on_stand_in:
        torch.cuda.set_device(device.index or 0)
    torch.set_num_threads(1)
    measured = list(rows(device, on_stand_in))
    launches: list[int | None] = []  # of Triton's kernels, which a driver of its own counts
    for row in measured:
        tell({"doing": f"{row.op}, {row.implementation}", "done": 0.0})
        (first,) = row.batch(1)
        first()  # compiles
        before = stand_in.launches() if on_stand_in else 0
        for call in row.batch(1):
            call()
        launches.append((stand_in.launches() - before or None) if on_stand_in else None)
    wait()
    batches = dict(enumerate(row.batch for row in measured))
    times = host_times(batches, seconds, wait, lambda done: tell({"doing": "timing", "done": done}))
    found = [_entry(row, times[index], launches[index]) for index, row in enumerate(measured)]
    gpu = None if on_stand_in else torch.cuda.get_device_name(device)
    return {"rows": found, "device": gpu or STAND_IN, "limits": list(LIMITS) if on_stand_in else []}


def _entry(row: Row, taken: HostTime, launches: int | None) -> dict[str, Any]:
    return {
        "op": row.op,
        "implementation": row.implementation,
        "host_microseconds": taken.microseconds,
        "p10_microseconds": taken.p10,
        "p90_microseconds": taken.p90,
        "batches": taken.batches,
        "undisturbed": taken.undisturbed,
        "launches": launches,
        "backend": row.backend,
        "shape": asdict(row.shape) | {"dtype": dtype_name(row.shape.dtype)},
    }


def main(arguments: list[str]) -> int:
    name, seconds = arguments

    def tell(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    try:
        tell(measure(name, float(seconds), tell))
    except UserError as error:
        tell({"error": str(error)})
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
