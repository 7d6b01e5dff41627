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
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from palkernels.attention.call import Call

COUNTER = "torch.utils.flop_counter"


def _text_pairs(num_queries: int, num_keys: int, window: int | None) -> int:
    """Query-key pairs of one head of one row, as far as shapes tell: positions and padding are not known to them."""
    window = num_keys if window is None else min(window, num_keys)
    first = num_keys - num_queries + 1  # keys up to the first query's own; each next query has one more
    growing = min(max(window - first + 1, 0), num_queries)  # queries before whose first key the window does not begin
    return growing * first + growing * (growing - 1) // 2 + (num_queries - growing) * window


def _pairs(call: Call) -> tuple[int, int]:
    """Of one head and all rows: query-key pairs, and pairs of a query and an audio token."""
    if call.cu_seqlens is None or call.cu_audio is None:
        text = _text_pairs(call.num_queries, call.num_keys, call.window)
        return call.num_batches * text, call.num_batches * call.num_queries * call.num_audio
    if is_fake(call.cu_seqlens) or call.cu_seqlens.is_meta:  # no lengths to read: every row as long as the longest
        texts, audios = [call.num_queries] * call.num_batches, [call.num_audio] * call.num_batches
    else:
        texts = call.cu_seqlens.diff().tolist()
        audios = call.cu_audio.diff().tolist()
        if call.audio_index is not None:
            audios = [audios[row] for row in call.audio_index.tolist()]
    audio = sum(text * tokens for text, tokens in zip(texts, audios, strict=True))
    return sum(_text_pairs(length, length, call.window) for length in texts), audio


def _product_flops(call: Call, pairs: int) -> int:
    """One matrix product over all pairs: 2 D operations for each."""
    return 2 * call.query.shape[1] * call.head_dim * pairs


def forward_flops(*arguments: Any, **kwargs: Any) -> int:
    call = Call(*arguments)
    return 2 * _product_flops(call, sum(_pairs(call)))


def backward_flops(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needed: Sequence[bool], *arguments: Any, **kwargs: Any
) -> int:
    """The products that the gradients need, each once: S for all, dP for all but dV, one for each gradient."""
    call = Call(*arguments)
    text, audio = _pairs(call)
    of_query, of_key, of_value, of_audio_key, of_audio_value = needed
    keys = text * of_key + audio * of_audio_key
    values = text * of_value + audio * of_audio_value
    scores = (text + audio) if of_query else text * (of_key or of_value) + audio * (of_audio_key or of_audio_value)
    dscores = (text + audio) if of_query else keys
    return _product_flops(call, scores + dscores + (text + audio) * of_query + keys + values)


def _projection_flops(states: Tensor, weight: Tensor) -> int:
    """One product of all states with one weight (Hkv * D, d)."""
    return 2 * states.shape[0] * states.shape[1] * weight.numel()


def audio_kv_forward_flops(states: Tensor, norm_weight: Tensor, k_weight: Tensor, *rest: Any, **kwargs: Any) -> int:
    return 2 * _projection_flops(states, k_weight)


def audio_kv_backward_flops(
    dkey: Tensor | None,
    dvalue: Tensor | None,
    needed: Sequence[bool],
    states: Tensor,
    norm_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """A product for each weight's gradient, one each for what the rows get from K and V, and the keys again for their
    norm's."""
    of_states, of_norm, of_k, of_v = needed[:4]
    products = (dkey is not None) * (of_k + (of_states or of_norm) + (k_norm_weight is not None))
    products += (dvalue is not None) * (of_v + (of_states or of_norm))
    return products * _projection_flops(states, k_weight)


def audio_kv_layers_flops(
    states: Tensor, norm_weight: Sequence[Tensor], k_weight: Sequence[Tensor], *rest: Any, **kwargs: Any
) -> int:
    return 2 * len(k_weight) * _projection_flops(states, k_weight[0])


def register() -> None:
    """Now, if PyTorch's counter is there; otherwise as soon as it is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.palkernels.lal_forward, get_raw=True)(forward_flops)
    counter.register_flop_formula(torch.ops.palkernels.lal_backward, get_raw=True)(backward_flops)
    counter.register_flop_formula(torch.ops.palkernels.audio_kv_forward, get_raw=True)(audio_kv_forward_flops)
    counter.register_flop_formula(torch.ops.palkernels.audio_kv_backward, get_raw=True)(audio_kv_backward_flops)
    counter.register_flop_formula(torch.ops.palkernels.audio_kv_layers, get_raw=True)(audio_kv_layers_flops)


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
