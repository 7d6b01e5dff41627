"""Audio keys and values that attention does not keep for its backward pass: they are projected again there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from palkernels.attention.call import Call
from palkernels.projection.call import Projection
from palkernels.projection.ops import run

_ATTRIBUTE = "_palkernels_recipe"


class Recipe:
    """How to project one layer's keys and values again."""

    def __init__(self, layer: Projection, impl: str):
        detached = {name: tensor.detach() for name, tensor in layer.tensors().items()}
        self.layer = replace(layer, **detached)  # type: ignore[arg-type]
        self.impl = impl
        self.versions = {name: tensor._version for name, tensor in detached.items()}
        self.other: dict[int, Tensor] = {}  # what was made with the last one and is not fetched yet

    def make(self, which: int) -> Tensor:
        """The keys (0) or the values (1). Both are made at once; the second is fetched without more work."""
        if which in self.other:
            return self.other.pop(which)
        for name, tensor in self.layer.tensors().items():
            if tensor._version != self.versions[name]:
                raise RuntimeError(f"{name} must not change between audio_kv(recompute=True) and the backward pass")
        with torch.no_grad():
            (made,) = run([self.layer], self.impl)
        self.other = {1 - which: made[1 - which]}
        return made[which]


def mark(key: Tensor, value: Tensor, recipe: Recipe) -> None:
    for which, tensor in enumerate((key, value)):
        setattr(tensor, _ATTRIBUTE, (recipe, which))
        if tensor._base is not None:  # it is that of views of the tensor, too, which are told by it
            setattr(tensor._base, _ATTRIBUTE, (recipe, which))


def problems_of(given: Call, computed: Call) -> list[Exception]:
    """A recipe that attention would not follow: the tensor is a view of what has it, or autocast made a copy."""
    problems: list[Exception] = []
    for name in ("audio_key", "audio_value"):
        tensor = getattr(given, name)
        recipe = getattr(tensor, _ATTRIBUTE, None)
        if recipe is None and getattr(tensor._base, _ATTRIBUTE, None) is not None:
            problems.append(ValueError(f"{name} must be what audio_kv(recompute=True) returned, got a view of it"))
        elif recipe is not None and getattr(computed, name) is not tensor:
            wanted, got = getattr(computed, name).dtype, tensor.dtype
            problems.append(TypeError(f"{name} of audio_kv(recompute=True) must have autocast's {wanted}, got {got}"))
    return problems


@contextmanager
def instead_of_saving(*tensors: Tensor) -> Iterator[None]:
    """Within the context autograd keeps, of those tensors that are marked, the recipe. All others go where they would
    have gone: to the hooks that were in force."""
    # By where they lie, not as tensors: what the hooks hold lives as long as the graph.
    recipes = {_place(tensor): found for tensor in tensors if (found := getattr(tensor, _ATTRIBUTE, None)) is not None}
    if not recipes or not torch.is_grad_enabled():
        yield
        return
    outer: tuple[Callable[..., Any], Callable[..., Any]] | None
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> tuple[bool, Any]:
        recipe = recipes.get(_place(tensor))
        if recipe is not None:
            return True, recipe
        return False, tensor if outer is None else outer[0](tensor)

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        is_recipe, kept = packed
        if is_recipe:
            recipe, which = kept
            made: Tensor = recipe.make(which)
            return made
        found: Tensor = kept if outer is None else outer[1](kept)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
