"""The attention function that an attached model's layers call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from palkernels import lal_attention, lal_attention_varlen
from palkernels.arguments import SCALES
from palkernels.model.causal_lm.layers import modeling_file
from palkernels.model.causal_lm.request import Carried, KeySpan, LalRequest
from palkernels.recompute import recomputed

# "sdpa" or "flex_attention" within the name would trigger transformers' capability checks for those.
ATTENTION_NAME = "palkernels_lal"
STOCK_CONFIG = "_palkernels_stock_config"  # on a selected layer's copied config: the config it replaced
# Keywords of transformers' attention functions that change what is seen; is_causal=True changes nothing.
UNSUPPORTED_KEYWORDS = ("is_causal", "cu_seq_lens_q", "cu_seq_lens_k")


def lal_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    lal_request: Carried | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to audio and text, by transformers' signature; without a request call the stock function.

    The stock mask is not used: causality, padding and window are the kernel's.

    Args:
        query: (B, Hq, T, D).
        key, value: (B, Hkv, S, D), of the text.

    Returns:
        The output (B, T, Hq, D), and None for the attention weights, which the kernels do not form.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    request: Any = None if lal_request is None else lal_request.request  # a LalRequest
    # A layer that sees no audio is ours for packed texts alone.
    if request is None or (layer not in request.selected and request.plan.packing is None):
        if kwargs.get("audio") is not None:
            raise ValueError(
                "audio must be given to the attached causal LM itself, got it in a call of another module, or of a "
                "forward that another library put in its place: that library first, Liger for instance, then attach "
                "again"
            )
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        if softcap is not None:
            kwargs["softcap"] = softcap
        stock = _stock_attention(module)
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    if dropout:
        raise ValueError(f"attention dropout must be 0 with audio: the kernels do not drop out, got {dropout}")
    for name in UNSUPPORTED_KEYWORDS:
        if name in kwargs and kwargs[name] is not None and kwargs[name] is not True:
            raise ValueError(
                f"{name} must not be given with audio: the kernels are causal over whole rows, packed ones are told by "
                "position_ids"
            )
    if request.plan.packing is not None:
        return _packed_attention(request, layer, query, key, value, scaling, softcap, sliding_window), None

    span: KeySpan = request.spans.get(key.shape[2]) or request.key_span(key.shape[2])
    if span.order is not None:
        query = span.order.ordered(query, span.order.queries)
        key, value = (span.order.ordered(x, span.order.keys) for x in (key, value))
    scales: Sequence[Tensor] = ()
    if request.recompute and torch.is_grad_enabled() and not _is_checkpointed(request, layer, module):
        audio_key, audio_value = recomputed(lambda _: request.project(layer), request.states_of(layer))
    elif request.cached is not None and layer in request.cached:  # without a call: so it is in every decoding step
        audio_key, audio_value, *scales = request.cached[layer]
    else:
        audio_key, audio_value, *scales = request.audio_kv(layer)
    keywords = span.keywords if not scales else span.keywords | dict(zip(SCALES, scales, strict=True))
    out = lal_attention(
        query,
        key,
        value,
        audio_key,
        audio_value,
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
        **keywords,
    )
    if span.order is not None:
        out = span.order.as_they_were(out)
    request.consumed.add(layer)
    return out.transpose(1, 2), None


def _packed_attention(
    request: LalRequest,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Return the output (1, T, Hq, D) of packed texts; a layer that sees no audio attends to the text alone."""
    sees_audio = layer in request.selected
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    keywords: dict[str, Any] = {"scale": scaling, "softcap": softcap, "window": window, "impl": request.impl}
    keywords |= vars(request.packed_span(without_audio=not sees_audio))
    out: Tensor = lal_attention_varlen(query, key, value, *request.packed_audio_kv(layer, key), **keywords)
    if sees_audio:
        request.consumed.add(layer)
    return out.unsqueeze(0)


def _is_checkpointed(request: LalRequest, layer: int, module: nn.Module) -> bool:
    """Return whether a layer is checkpointed as a whole, so that it keeps nothing anyway."""
    return module.training and bool(getattr(request.modules[layer], "gradient_checkpointing", False))


def _stock_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    name = getattr(module.config, STOCK_CONFIG)._attn_implementation
    stock: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, None)
    return modeling_file(module).eager_attention_forward if stock is None else stock  # type: ignore[no-any-return]


AttentionInterface.register(ATTENTION_NAME, lal_attention_forward)
