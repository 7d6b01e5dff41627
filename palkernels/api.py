"""The public functions. Each checks its arguments, chooses an implementation, and runs it."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

import torch
from torch import Tensor

from palkernels import devices, plans
from palkernels import recompute as recomputation
from palkernels.arguments import Call
from palkernels.attention import checks, packed
from palkernels.attention.implementations import repeat as repeat_attention
from palkernels.attention.implementations import run as run_attention
from palkernels.dispatch import check_impl, choose, raise_problems
from palkernels.projection import checks as projection_checks
from palkernels.projection.implementations import run as run_projection
from palkernels.projection.implementations import run_recomputed as run_recomputed_projection

PerLayer: TypeAlias = Sequence[Tensor | None] | None


@overload
def lal_attention(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *,
    audio_lengths: Tensor | None = ..., audio_index: Tensor | None = ..., audio_visible_from: Tensor | None = ...,
    audio_key_scale: Tensor | None = ..., audio_value_scale: Tensor | None = ..., text_start: Tensor | None = ...,
    text_end: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., window: int | None = ..., return_lse: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def lal_attention(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *,
    audio_lengths: Tensor | None = ..., audio_index: Tensor | None = ..., audio_visible_from: Tensor | None = ...,
    audio_key_scale: Tensor | None = ..., audio_value_scale: Tensor | None = ..., text_start: Tensor | None = ...,
    text_end: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., window: int | None = ..., return_lse: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def lal_attention(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *,
    audio_lengths: Tensor | None = ..., audio_index: Tensor | None = ..., audio_visible_from: Tensor | None = ...,
    audio_key_scale: Tensor | None = ..., audio_value_scale: Tensor | None = ..., text_start: Tensor | None = ...,
    text_end: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., window: int | None = ..., return_lse: bool, impl: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


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
    audio_key_scale: Tensor | None = None,
    audio_value_scale: Tensor | None = None,
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
        audio_key, audio_value: (A, Hkv, N, D); N may be 0. Query's dtype too, or with scales float8_e4m3fn.
        audio_lengths: (A,) valid tokens of each audio row, 0 to N; None: all N.
        audio_index: (B,) the audio row that each text row reads; None: A == B, row for row.
        audio_visible_from: (B, N) first key position whose query sees the token; None: every query does.
        audio_key_scale, audio_value_scale: (A, Hkv) float32, positive, iff audio_key and audio_value are float8_e4m3fn
            (:func:`palkernels.quantize_audio_kv`): keys are ``audio_key * audio_key_scale[:, :, None, None]``, values
            likewise. There are no gradients then, and "triton" needs compute capability 8.9.
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
    tensors = (
        query, key, value, audio_key, audio_value,
        audio_lengths, audio_index, audio_visible_from, text_start, text_end, audio_key_scale, audio_value_scale,
    )  # fmt: skip
    seen = plans.geometry(tensors, (scale, softcap, window, impl)) if plans.usable() else None
    results = None if seen is None else repeat_attention(seen, tensors)
    if results is None:
        call = Call.of(tensors, (scale, softcap, window))
        check_impl(impl)
        raise_problems(checks.problems_of(call))
        ready = checks.prepared(call)
        raise_problems(recomputation.problems_of(call, ready))
        results = _attend(ready, impl, seen, tensors)
    return results if return_lse else results[0]


@overload
def lal_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *, cu_seqlens: Tensor,
    cu_audio: Tensor, max_seqlen: int, max_audio: int, audio_index: Tensor | None = ...,
    audio_visible_from: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    window: int | None = ..., return_lse: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def lal_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *, cu_seqlens: Tensor,
    cu_audio: Tensor, max_seqlen: int, max_audio: int, audio_index: Tensor | None = ...,
    audio_visible_from: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    window: int | None = ..., return_lse: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def lal_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, *, cu_seqlens: Tensor,
    cu_audio: Tensor, max_seqlen: int, max_audio: int, audio_index: Tensor | None = ...,
    audio_visible_from: Tensor | None = ..., scale: float | None = ..., softcap: float | None = ...,
    window: int | None = ..., return_lse: bool, impl: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


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

    Text row b holds the tokens from ``cu_seqlens[b]`` on, below ``cu_seqlens[b + 1]``, each with its query, key and
    value: T = S. It reads audio row a = ``audio_index[b]``, which holds the audio tokens from ``cu_audio[a]`` on, below
    ``cu_audio[a + 1]``. What a query sees, and all that is not said here, is as in :func:`lal_attention`.

    Args:
        query: (sum T, Hq, D), float16, bfloat16, float32 or float64.
        key, value: (sum T, Hkv, D); Hq a multiple of Hkv. Same dtype and device as query.
        audio_key, audio_value: (sum N, Hkv, D).
        cu_seqlens: (B + 1,) from 0 to sum T, never decreasing.
        cu_audio: (A + 1,) from 0 to sum N, never decreasing.
        max_seqlen: the tokens of the longest text row, or more.
        max_audio: the tokens of the longest audio row, or more.
        audio_index: (B,) the audio row that each text row reads; None: A == B, row for row.
        audio_visible_from: (sum N,) first position, counted in the text row that reads the token, whose query sees
            it; None: every query does. Not together with ``audio_index``.
        scale, softcap, window, return_lse, impl: as in :func:`lal_attention`. "sdpa" and "reference" compute row by
            row and read the lengths on the host.

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
    check_impl(impl)
    raise_problems(checks.packed_problems_of(call))
    raise_problems(recomputation.problems_of(call, call))
    out, lse = _attend(checks.prepared(packed.heads_first(call)), impl)
    out, lse = packed.tokens_first(out), lse.squeeze(0)
    return (out, lse) if return_lse else out


@overload
def audio_kv(
    states: Tensor, norm_weight: Tensor, k_weight: Tensor, v_weight: Tensor, *, num_kv_heads: int, eps: float,
    norm_offset: float = ..., k_bias: Tensor | None = ..., v_bias: Tensor | None = ...,
    k_norm_weight: Tensor | None = ..., cos: Tensor | None = ..., sin: Tensor | None = ..., recompute: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def audio_kv(
    states: Tensor, norm_weight: Sequence[Tensor], k_weight: Sequence[Tensor],
    v_weight: Sequence[Tensor], *, num_kv_heads: int, eps: float,
    norm_offset: float = ..., k_bias: PerLayer = ..., v_bias: PerLayer = ..., k_norm_weight: PerLayer = ...,
    cos: Tensor | PerLayer = ..., sin: Tensor | PerLayer = ..., recompute: bool = ..., impl: str = ...,
) -> tuple[list[Tensor], list[Tensor]]: ...  # fmt: skip


def audio_kv(
    states: Tensor,
    norm_weight: Tensor | Sequence[Tensor],
    k_weight: Tensor | Sequence[Tensor],
    v_weight: Tensor | Sequence[Tensor],
    *,
    num_kv_heads: int,
    eps: float,
    norm_offset: float = 0.0,
    k_bias: Tensor | PerLayer = None,
    v_bias: Tensor | PerLayer = None,
    k_norm_weight: Tensor | PerLayer = None,
    cos: Tensor | PerLayer = None,
    sin: Tensor | PerLayer = None,
    recompute: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Audio keys and values of one layer, or of all layers of a model at once, from the audio states.

    ``y = states / rms(states) * (norm_weight + norm_offset)`` with ``rms(x) = sqrt(mean(x^2) + eps)``, then
    ``K = rope(head_norm(k_weight y + k_bias))`` and ``V = v_weight y + v_bias``: what a decoder layer's own norm and
    projections make of its input (LAL, arXiv 2506.10423). Head norm is the same norm over each head's D columns, with
    ``k_norm_weight``. RoPE turns the first R of them: column i with column i + R / 2.

    Differentiable in all tensors but cos and sin. For the backward pass it keeps its arguments and nothing else.

    Args:
        states: (A, N, d), float16, bfloat16, float32 or float64. They must be finite, in padding too.
        norm_weight: (d,), of any of these dtypes.
        k_weight, v_weight: (Hkv * D, d), of states' dtype.
        num_kv_heads: Hkv.
        eps: added to the mean squares, of both norms.
        norm_offset: added to both norms' weights: 1.0 for Gemma.
        k_bias, v_bias: (Hkv * D,), of states' dtype; None: no bias.
        k_norm_weight: (D,), of any of these dtypes; None: no head norm.
        cos, sin: (N, R) or (A, N, R), of any of these dtypes, R even and at most D, from the model's rotary embedding;
            None: no RoPE.
        recompute: keys and values are not kept for the backward pass of :func:`lal_attention`, which projects them
            again. They must reach it as they are returned, not as views. Not under torch.compile.
        impl: "triton" (Triton kernels around PyTorch's matrix products), "sdpa" (plain PyTorch, any device),
            "reference" (the definition), or "auto", as in :func:`lal_attention`.

    For several layers, weights, biases and norms are lists with an entry per layer; cos and sin may be lists or
    tensors. With "triton" and without gradients, the layers share one normalisation and one batched product:
    norm_weight is folded into the projections.

    Returns:
        audio_key, audio_value: each (A, Hkv, N, D), contiguous as (A, N, Hkv, D); or two lists of them.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; or ``impl`` cannot run these inputs. Every reason is named.
    """
    check_impl(impl)
    per_layer = {
        "norm_weight": norm_weight, "k_weight": k_weight, "v_weight": v_weight, "k_bias": k_bias, "v_bias": v_bias,
        "k_norm_weight": k_norm_weight, "cos": cos, "sin": sin,
    }  # fmt: skip
    numbers = {"num_kv_heads": num_kv_heads, "eps": eps, "norm_offset": norm_offset}
    seen = projection_checks.seen(states, per_layer, numbers, impl) if plans.usable() else None
    if projection_checks.is_checked(seen):
        layers, impl = projection_checks.checked_layers(states, per_layer, numbers), "triton"
    else:
        layers, problems = projection_checks.layers_of(states, per_layer, numbers)
        raise_problems(problems + recomputation.compile_problems(recompute))
        reasons = projection_checks.triton_reasons(layers[0].states, layers[0].k_weight, num_kv_heads)
        impl = choose(impl, reasons, on_cuda=devices.runs_kernels(states.device))
        if impl == "triton":
            projection_checks.keep_checked(seen, states, per_layer, layers)
    if recompute and torch.is_grad_enabled():
        results = [run_recomputed_projection(layer, impl) for layer in layers]
    else:
        results = run_projection(layers, impl, are_plain=seen is not None)
    if not projection_checks.in_lists(k_weight):
        return results[0]
    keys, values = zip(*results, strict=True)
    return list(keys), list(values)


def _attend(
    call: Call, impl: str, seen: plans.Geometry | None = None, tensors: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Tensor]:
    """Output and LSE of a prepared call by the implementation that ``impl`` stands for."""
    on_cuda = devices.runs_kernels(call.query.device)
    return run_attention(call, choose(impl, checks.triton_reasons(call), on_cuda=on_cuda), seen, tensors)
