"""The attention function that an attached model's layers call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from palkernels import lal_attention
from palkernels.model.causal_lm.layers import modeling_file
from palkernels.model.causal_lm.request import Carried, LalRequest
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
    if lal_request is None:
        if kwargs.get("audio") is not None:
            raise ValueError("audio must be given to the attached causal LM itself, got it in a call of another module")
        settings = {"sliding_window": sliding_window, "softcap": softcap}
        kwargs |= {name: setting for name, setting in settings.items() if setting is not None}
        stock = _stock_attention(module)
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    request: LalRequest = lal_request.request  # type: ignore[assignment]
    if dropout:
        raise ValueError(f"attention dropout must be 0 with audio: the kernels do not drop out, got {dropout}")
    for name in UNSUPPORTED_KEYWORDS:
        setting = kwargs.get(name)
        if setting is not None and setting is not True:
            raise ValueError(f"{name} must not be given with audio: the kernels are causal over whole rows")
    layer: int = module.layer_idx  # type: ignore[assignment]
    layout, span = request.plan.layout, request.key_span(key.shape[2])

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
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
        impl=request.impl,
    )
    request.consumed.add(layer)
    return out.transpose(1, 2), None


def _stock_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    name = getattr(module.config, STOCK_CONFIG)._attn_implementation
    eager = modeling_file(module).eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


AttentionInterface.register(ATTENTION_NAME, lal_attention_forward)
