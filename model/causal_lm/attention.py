"""The attention function that an attached model's layers call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from palkernels import lal_attention, lal_attention_varlen
from palkernels.model.causal_lm.layers import modeling_file
from palkernels.model.causal_lm.request import Carried
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
    sees_no_audio = request is not None and layer not in request.selected  # it is ours for packed texts alone
    if request is None or (sees_no_audio and request.plan.packing is None):
        if kwargs.get("audio") is not None:
            raise ValueError(
                "audio must be given to the attached causal LM itself, got it in a call of another module, or of a "
                "forward that another library put in its place: that library first, Liger for instance, then attach "
                "again"
            )
        given = {"sliding_window": sliding_window, "softcap": softcap}
        kwargs |= {name: setting for name, setting in given.items() if setting is not None}
        stock = _stock_attention(module)
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    if dropout:
        raise ValueError(f"attention dropout must be 0 with audio: the kernels do not drop out, got {dropout}")
    for name in UNSUPPORTED_KEYWORDS:
        setting = kwargs.get(name)
        if setting is not None and setting is not True:
            raise ValueError(
                f"{name} must not be given with audio: the kernels are causal over whole rows, packed ones are told by "
                "position_ids"
            )
    settings: dict[str, Any] = {"scale": scaling, "softcap": softcap, "window": sliding_window, "impl": request.impl}
    if request.plan.packing is not None:
        texts = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
        keywords: dict[str, Any] = {**vars(request.packed_span(sees_no_audio)), **settings}
        audio = request.packed_audio_kv(layer, texts[1])
        packed_out = lal_attention_varlen(texts[0], texts[1], texts[2], *audio, **keywords)
        if not sees_no_audio:
            request.consumed.add(layer)
        return packed_out.unsqueeze(0), None

    layout, span = request.plan.layout, request.key_span(key.shape[2])
    if span.order is not None:
        query = span.order.ordered(query, span.order.queries)
        key, value = (span.order.ordered(x, span.order.keys) for x in (key, value))

    # A layer that is checkpointed as a whole keeps nothing anyway.
    checkpointed = getattr(request.modules[layer], "gradient_checkpointing", False) and module.training
    if request.recompute and torch.is_grad_enabled() and not checkpointed:
        states = request.states_of(layer)
        audio_key, audio_value = recomputed(lambda _: request.project(layer), states)
    else:
        audio_key, audio_value = request.audio_kv(layer)
    out = lal_attention(
        query,
        key,
        value,
        audio_key,
        audio_value,
        audio_lengths=layout.lengths,
        audio_index=layout.index,
        audio_visible_from=span.visible_from,
        text_start=span.text_start,
        text_end=span.text_end,
        **settings,
    )
    if span.order is not None:
        out = span.order.as_they_were(out)
    request.consumed.add(layer)
    return out.transpose(1, 2), None


def _stock_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    name = getattr(module.config, STOCK_CONFIG)._attn_implementation
    eager = modeling_file(module).eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


AttentionInterface.register(ATTENTION_NAME, lal_attention_forward)
