"""Launches of this library's operators are said to be as many as their code makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from palkernels import audio_kv, lal_attention
from palkernels.bench.instruments.costs import CostCounter
from palkernels.kernels.launch import Launch
from palkernels.projection import ops

FUNCTIONS = {
    "palkernels::audio_kv_forward": ops.forward,
    "palkernels::audio_kv_backward": ops.backward,
    "palkernels::audio_kv_layers": ops.layers_forward,
}


class Inside(CostCounter):
    """Counts what our operators in PyTorch and Triton say that they launch, and what they do launch."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.said, self.pytorch, self.ours = [0, 0], 0, 0
        self.again = False  # an operator's function runs a second time, to be seen from within
        run = Launch.run

        def counted(launch: Launch) -> None:
            if not self.again:
                self.ours += 1
                run(launch)

        patch.setattr(Launch, "run", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not name.startswith("palkernels::"):
            return func(*args, **(kwargs or {}))
        with CostCounter() as said:
            out = func(*args, **(kwargs or {}))
        costs = said.segments[0]
        self.said[0] += costs["kernels"] - costs["our_kernels"]
        self.said[1] += costs["our_kernels"]
        if name in FUNCTIONS:
            self.again = True
            with CostCounter() as inner:
                FUNCTIONS[name](*args, **(kwargs or {}))
            self.again = False
            self.pytorch += inner.segments[0]["kernels"]
        return out


def check(run: Callable[[], Any]) -> None:
    with pytest.MonkeyPatch.context() as patch, Inside(patch) as counted:
        run()
    assert counted.ours > 0
    assert counted.said == [counted.pytorch, counted.ours]


def leaves(*shapes: tuple[int, ...], needed: tuple[bool, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=need) for shape, need in zip(shapes, needed, strict=True)]


@pytest.mark.parametrize("dim", [16, 144])  # dK and dV in one launch, or in two
@pytest.mark.parametrize("needed", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 0, 0, 1)])
def test_attention(dim: int, needed: tuple[bool, ...]) -> None:
    shapes = [(1, 2, 5, dim), *[(1, 1, 5, dim)] * 2, *[(1, 1, 7, dim)] * 2]
    inputs = leaves(*shapes, needed=tuple(map(bool, needed)))
    check(lambda: lal_attention(*inputs, impl="triton").sum().backward())


def layer(head_norm: bool, bias: bool, rope: bool, dtype: torch.dtype) -> dict[str, Any]:
    weights: dict[str, Any] = {"norm_weight": torch.ones(24), **dict.fromkeys(("k_weight", "v_weight"))}
    weights |= {name: torch.randn(16, 24) for name in ("k_weight", "v_weight")}
    weights |= {name: torch.randn(16) for name in ("k_bias", "v_bias")} if bias else {}
    weights |= {"k_norm_weight": torch.ones(8)} if head_norm else {}
    weights = {name: x.to(dtype).requires_grad_() for name, x in weights.items()}
    return weights | ({name: torch.randn(1, 6, 8).to(dtype) for name in ("cos", "sin")} if rope else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [(False, False, True), (True, True, True), (True, False, False), (False, True, False)]
)
@pytest.mark.parametrize("used", ["both", "keys", "values"])
def test_projection(options: tuple[bool, bool, bool], used: str, dtype: torch.dtype) -> None:
    weights = layer(*options, dtype)
    states = torch.randn(1, 6, 24, dtype=dtype, requires_grad=True)

    def run() -> None:
        key, value = audio_kv(states, **weights, num_kv_heads=2, eps=1e-5, impl="triton")
        # In the layout of the kernels, which is that of attention's gradients.
        gradients = [torch.ones_like(x) for x in (key, value)]
        chosen = {"both": slice(0, 2), "keys": slice(0, 1), "values": slice(1, 2)}[used]
        torch.autograd.backward([key, value][chosen], gradients[chosen])

    check(run)


@pytest.mark.parametrize("options", [(False, False, True), (True, True, True), (False, False, False)])
def test_projection_of_all_layers(options: tuple[bool, bool, bool]) -> None:
    weights = {name: [x] * 3 for name, x in layer(*options, torch.float16).items()}
    states = torch.randn(1, 6, 24, dtype=torch.float16)
    with torch.no_grad():
        check(lambda: audio_kv(states, **weights, num_kv_heads=2, eps=1e-5, impl="triton"))
