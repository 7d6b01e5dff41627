"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

That module imports triton, and ``import palkernels`` must not. So the formulas are registered when a program imports
it, whichever of the two it imports first.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


def _text_pairs(query: torch.Size, key: torch.Size, window: int | None) -> int:
    """Query-key pairs of one head of one row, as far as shapes tell: positions and padding are not known to them."""
    num_queries, num_keys = query[2], key[2]
    window = num_keys if window is None else min(window, num_keys)
    first = num_keys - num_queries + 1  # keys up to the first query's own; each next query has one more
    growing = min(max(window - first + 1, 0), num_queries)  # queries before whose first key the window does not begin
    return growing * first + growing * (growing - 1) // 2 + (num_queries - growing) * window


def _product_flops(query: torch.Size, pairs: int) -> int:
    """One matrix product over all pairs: 2 D operations for each."""
    return 2 * query[0] * query[1] * query[3] * pairs


def forward_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, audio_key: torch.Size, *args: Any, **kwargs: Any
) -> int:
    pairs = _text_pairs(query, key, args[-1]) + query[2] * audio_key[2]
    return 2 * _product_flops(query, pairs)


def backward_flops(
    dout: torch.Size,
    dlse: torch.Size | None,
    out: torch.Size,
    lse: torch.Size,
    needed: Sequence[bool],
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    audio_key: torch.Size,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The products that the gradients need, each once: S for all, dP for all but dV, one for each gradient."""
    text, audio = _text_pairs(query, key, args[-1]), query[2] * audio_key[2]
    of_query, of_key, of_value, of_audio_key, of_audio_value = needed
    keys = text * of_key + audio * of_audio_key
    values = text * of_value + audio * of_audio_value
    scores = (text + audio) if of_query else text * (of_key or of_value) + audio * (of_audio_key or of_audio_value)
    dscores = (text + audio) if of_query else keys
    return _product_flops(query, scores + dscores + (text + audio) * of_query + keys + values)


def register() -> None:
    """Now, if PyTorch's counter is there; otherwise as soon as it is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.palkernels.lal_forward)(forward_flops)
    counter.register_flop_formula(torch.ops.palkernels.lal_backward)(backward_flops)


class _OnImport(MetaPathFinder):
    """Finds the counter where it lies, and registers the formulas once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader, finder: MetaPathFinder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
