"""``unsupported_reasons``: what a public function would raise, without running it."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from torch import Tensor

from palkernels import api
from palkernels import recompute as recomputation
from palkernels.api import PerLayer
from palkernels.arguments import Call
from palkernels.attention import checks, packed
from palkernels.attention.implementations import transform_reasons
from palkernels.dispatch import check_impl
from palkernels.projection import checks as projection_checks


@overload
def unsupported_reasons(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *,
    audio_lengths: Tensor | None = ..., audio_index: Tensor | None = ..., audio_visible_from: Tensor | None = ...,
    audio_key_scale: Tensor | None = ..., audio_value_scale: Tensor | None = ..., text_start: Tensor | None = ...,
    text_end: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., window: int | None = ..., return_lse: bool = ..., impl: str = ...,
) -> list[str]: ...  # fmt: skip


@overload
def unsupported_reasons(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *, cu_seqlens: Tensor,
    cu_audio: Tensor, max_seqlen: int, max_audio: int, audio_index: Tensor | None = ...,
    audio_visible_from: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    window: int | None = ..., return_lse: bool = ..., impl: str = ...,
) -> list[str]: ...  # fmt: skip


@overload
def unsupported_reasons(
    states: Tensor, norm_weight: Tensor | Sequence[Tensor], k_weight: Tensor | Sequence[Tensor],
    v_weight: Tensor | Sequence[Tensor], *, num_kv_heads: int, eps: float, norm_offset: float = ...,
    k_bias: Tensor | PerLayer = ..., v_bias: Tensor | PerLayer = ..., k_norm_weight: Tensor | PerLayer = ...,
    cos: Tensor | PerLayer = ..., sin: Tensor | PerLayer = ..., recompute: bool = ..., impl: str = ...,
) -> list[str]: ...  # fmt: skip


def unsupported_reasons(*args: Any, impl: str = "triton", **kwargs: Any) -> list[str]:
    """Why a public function would raise on these arguments: every reason at once, invalid arguments included.

    An empty list says that ``impl`` runs them. The arguments are those of :func:`lal_attention`; with a keyword that
    only :func:`lal_attention_varlen` has, such as ``cu_seqlens``, they are its arguments; with one that only
    :func:`audio_kv` has, such as ``num_kv_heads``, its.

    Raises:
        TypeError: the function has no such argument, or one is missing.
        ValueError: ``impl`` is no implementation.
    """
    function = _function_with(kwargs)
    bound = inspect.signature(function).bind(*args, impl=impl, **kwargs)
    bound.apply_defaults()
    check_impl(impl)
    return _REASONS[function](bound.arguments)


def _function_with(keywords: Iterable[str]) -> Callable[..., Any]:
    """The public function that has these keywords."""
    common = inspect.signature(api.lal_attention).parameters.keys()
    for function in (api.lal_attention_varlen, api.audio_kv):
        if (inspect.signature(function).parameters.keys() - common).intersection(keywords):
            return function
    return api.lal_attention


def _attention_reasons(arguments: dict[str, Any]) -> list[str]:
    impl = arguments.pop("impl")
    del arguments["return_lse"]
    call = Call(**arguments)
    problems = checks.problems_of(call)
    if not problems:
        prepared = checks.prepared(call)
        problems = recomputation.problems_of(call, prepared)
        call = prepared
    return _with_triton_reasons(problems, call, impl)


def _packed_attention_reasons(arguments: dict[str, Any]) -> list[str]:
    impl = arguments.pop("impl")
    del arguments["return_lse"]
    call = Call(**arguments)
    problems = checks.packed_problems_of(call)
    if not problems:
        problems = recomputation.problems_of(call, call)
        call = checks.prepared(packed.heads_first(call))
    return _with_triton_reasons(problems, call, impl)


def _with_triton_reasons(problems: Sequence[Exception], call: Call, impl: str) -> list[str]:
    reasons = [str(problem) for problem in problems]
    if impl != "triton" or not isinstance(call.query, Tensor):
        return reasons
    return reasons + checks.triton_reasons(call) + ([] if problems else transform_reasons(call))


def _audio_kv_reasons(arguments: dict[str, Any]) -> list[str]:
    impl, recompute, states = (arguments.pop(name) for name in ("impl", "recompute", "states"))
    numbers = {name: arguments.pop(name) for name in ("num_kv_heads", "eps", "norm_offset")}
    layers, problems = projection_checks.layers_of(states, arguments, numbers)
    reasons = [str(problem) for problem in problems + recomputation.compile_problems(recompute)]
    if impl != "triton" or not isinstance(states, Tensor):
        return reasons
    k_weight = arguments["k_weight"]
    if layers:
        states, k_weight = layers[0].states, layers[0].k_weight
    elif projection_checks.in_lists(k_weight):
        k_weight = next(iter(k_weight), None)
    return reasons + projection_checks.triton_reasons(states, k_weight, numbers["num_kv_heads"])


_REASONS: dict[Callable[..., Any], Callable[[dict[str, Any]], list[str]]] = {
    api.lal_attention: _attention_reasons,
    api.lal_attention_varlen: _packed_attention_reasons,
    api.audio_kv: _audio_kv_reasons,
}
