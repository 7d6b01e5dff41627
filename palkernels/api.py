"""The public functions, and which implementation runs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from palkernels import op_costs as flops
from palkernels import reference
from palkernels.attention import checks, ops, packed, sdpa
from palkernels.attention.call import Call
from palkernels.projection import checks as projection_checks
from palkernels.projection import ops as projection
from palkernels.projection import recipes
from palkernels.projection.call import Projection


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
            TRITON_INTERPRET=1, and fake tensors anywhere: no kernel runs for them.

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
    checks.check_impl(impl)
    _raise_first(checks.problems_of(call))
    prepared = checks.prepared(call)
    if not torch.compiler.is_compiling():
        _raise_first(recipes.problems_of(call, prepared))
    out, lse = _run(prepared, impl)
    return (out, lse) if return_lse else out


def lal_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    audio_key: Tensor,
    audio_value: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_audio: Tensor,
    max_seqlen: int,
    max_audio: int,
    audio_index: Tensor | None = None,
    audio_visible_from: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`lal_attention` on rows that lie one after another, without padding, packed as flash-attn packs them.

    Row b holds the text tokens from ``cu_seqlens[b]`` on, below ``cu_seqlens[b + 1]``, each with its query, key and
    value: T = S. It reads audio row ``audio_index[b]``, the tokens from ``cu_audio`` likewise. Everything else is as
    there.

    Args:
        query: (sum T, Hq, D), float16, bfloat16, float32 or float64.
        key, value: (sum T, Hkv, D); Hq a multiple of Hkv. Same dtype and device as query.
        audio_key, audio_value: (sum N, Hkv, D).
        cu_seqlens: (B + 1,) from 0 to sum T, never decreasing.
        cu_audio: (A + 1,) from 0 to sum N, likewise.
        max_seqlen, max_audio: the longest row's tokens, or more.
        audio_index: (B,) the audio row that each text row reads; None: A == B, row for row.
        audio_visible_from: (sum N,) first position, counted in its own row, whose query sees the token; None: every
            query does. Not together with ``audio_index``.
        scale, softcap, window, return_lse, impl: as in :func:`lal_attention`. All but "triton" compute row by row and
            read the lengths on the host.

    Returns:
        out (sum T, Hq, D) in query's dtype, contiguous; with ``return_lse`` also the LSE (Hq, sum T).

    Raises:
        TypeError, ValueError: as :func:`lal_attention`.
    """
    call = Call(
        query, key, value, audio_key, audio_value, audio_index=audio_index, audio_visible_from=audio_visible_from,
        scale=scale, softcap=softcap, window=window, cu_seqlens=cu_seqlens, cu_audio=cu_audio, max_seqlen=max_seqlen,
        max_audio=max_audio,
    )  # fmt: skip
    checks.check_impl(impl)
    _raise_first(checks.packed_problems_of(call))
    if not torch.compiler.is_compiling():
        _raise_first(recipes.problems_of(call, call))
    out, lse = _run(checks.prepared(packed.heads_first(call)), impl)
    out, lse = packed.tokens_first(out), lse.squeeze(0)
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
    checks.check_impl(impl)
    reasons = [str(problem) for problem in checks.problems_of(call)]
    if impl == "triton" and isinstance(query, Tensor):
        reasons += checks.triton_reasons(call if reasons else checks.prepared(call))
    return reasons


def audio_kv(
    states: Tensor,
    norm_weight: Tensor | Sequence[Tensor],
    k_weight: Tensor | Sequence[Tensor],
    v_weight: Tensor | Sequence[Tensor],
    *,
    num_kv_heads: int,
    eps: float,
    norm_offset: float = 0.0,
    k_bias: Tensor | Sequence[Tensor | None] | None = None,
    v_bias: Tensor | Sequence[Tensor | None] | None = None,
    k_norm_weight: Tensor | Sequence[Tensor | None] | None = None,
    cos: Tensor | Sequence[Tensor | None] | None = None,
    sin: Tensor | Sequence[Tensor | None] | None = None,
    recompute: bool = False,
    impl: str = "auto",
) -> tuple[Any, Any]:
    """Audio keys and values of one layer, or of all layers of a model at once, from the audio states.

    ``y = states / rms(states) * (norm_weight + norm_offset)`` with ``rms(x) = sqrt(mean(x^2) + eps)``, then
    ``K = rope(head_norm(k_weight y + k_bias))`` and ``V = v_weight y + v_bias``: what a decoder layer's own norm and
    projections make of its input (LAL, arXiv 2506.10423). Head norm is the same norm over each head's D columns, with
    ``k_norm_weight``. RoPE turns the first R of them: column i with column i + R / 2.

    Differentiable in all tensors but cos and sin. For the backward pass it keeps its arguments and nothing else.

    Args:
        states: (A, N, d), float16, bfloat16, float32 or float64. They must be finite, in padding too.
        norm_weight: (d,), as k_norm_weight, cos and sin of any of these dtypes.
        k_weight, v_weight: (Hkv * D, d), of states' dtype, as the biases.
        num_kv_heads: Hkv.
        eps: added to the mean squares, of both norms.
        norm_offset: added to both norms' weights: 1.0 for Gemma.
        k_bias, v_bias: (Hkv * D,) or None.
        k_norm_weight: (D,); None: no head norm.
        cos, sin: (N, R) or (A, N, R), R even and at most D, from the model's rotary embedding; None: no RoPE.
        recompute: :func:`lal_attention` keeps neither K nor V for its backward pass but projects them again there. They
            must reach it as they are returned, not as views. Not under torch.compile.
        impl: "triton" (Triton kernels around PyTorch's matrix products), "sdpa" (plain PyTorch, any device),
            "reference" (the definition), or "auto", as in :func:`lal_attention`.

    The weights, biases and norms may be lists with an entry per layer; cos and sin may be, too. With
    "triton" and without gradients, layers in a list share one normalisation and one batched product: norm_weight is
    folded into the projections.

    Returns:
        audio_key, audio_value: each (A, Hkv, N, D), contiguous as (A, N, Hkv, D); or two lists of them.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; or ``impl`` cannot run these inputs.
    """
    checks.check_impl(impl)
    per_layer = {
        "norm_weight": norm_weight, "k_weight": k_weight, "v_weight": v_weight, "k_bias": k_bias, "v_bias": v_bias,
        "k_norm_weight": k_norm_weight, "cos": cos, "sin": sin,
    }  # fmt: skip
    numbers = {"num_kv_heads": num_kv_heads, "eps": eps, "norm_offset": norm_offset}
    layers, in_lists = projection_checks.layers_of(states, per_layer, numbers)
    if recompute and torch.compiler.is_compiling():
        raise NotImplementedError("recompute must be False under torch.compile, which chooses itself what to recompute")
    chosen = _projection_impl(layers, impl)
    results = projection.run(layers, chosen)
    if recompute and torch.is_grad_enabled():
        for layer, (key, value) in zip(layers, results, strict=True):
            recipes.mark(key, value, recipes.Recipe(layer, chosen))
    if not in_lists:
        return results[0]
    keys, values = zip(*results, strict=True)
    return list(keys), list(values)


def _projection_impl(layers: list[Projection], impl: str) -> str:
    reasons = projection_checks.triton_reasons(layers) if impl in ("auto", "triton") else []
    if impl == "triton" and reasons:
        raise ValueError(f"impl='triton' cannot run: {'; '.join(reasons)}")
    if impl == "auto":
        return "triton" if layers[0].states.is_cuda and not reasons else "sdpa"
    return impl


def _raise_first(problems: list[Exception]) -> None:
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))


def _run(call: Call, impl: str) -> tuple[Tensor, Tensor]:
    if impl == "auto":
        impl = "triton" if call.query.is_cuda and not checks.triton_reasons(call) else "sdpa"
    elif impl == "triton":
        reasons = checks.triton_reasons(call)
        if reasons:
            raise ValueError(f"impl='triton' cannot run: {'; '.join(reasons)}")
    run = _RUN[impl]
    if call.cu_seqlens is not None and impl != "triton":
        run = partial(packed.row_by_row, attention=run)
    if torch.compiler.is_compiling():
        return run(call)
    with recipes.instead_of_saving(call.audio_key, call.audio_value):
        return run(call)


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
    call = checks.clamped(call)
    return sdpa.lal_attention(*call.floats().values(), settings=sdpa.Settings(**call.options()))


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    call = checks.clamped(call)
    result = reference.lal_attention(*call.floats().values(), **call.options(), return_lse=True)
    assert isinstance(result, tuple)
    return result


_RUN = {"triton": _run_triton, "sdpa": _run_sdpa, "reference": _run_reference}
flops.register()  # of the operators of both modules, ops and projection
