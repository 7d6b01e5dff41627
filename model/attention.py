"""The attention function that an attached model's layers call, and what one forward carries to it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from palkernels import lal_attention
from palkernels.model.audio_state import AudioState
from palkernels.model.plan import AudioLayout

# "sdpa" or "flex_attention" within the name would trigger transformers' capability checks for those.
ATTENTION_NAME = "palkernels_lal"
STOCK_CONFIG = "_palkernels_stock_config"  # on a selected layer's copied config: the config it replaced
REQUEST_KEYWORD = "lal_request"
# Keywords of transformers' attention functions that change what is seen; is_causal=True changes nothing.
UNSUPPORTED_KEYWORDS = ("is_causal", "cu_seq_lens_q", "cu_seq_lens_k")

AudioKV = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Request:
    """One forward's audio, ready for every layer. Not a tensor, so that transformers hands it through untouched."""

    state: AudioState
    layout: AudioLayout
    layers: list[nn.Module]
    rotation: tuple[Tensor, Tensor] | None  # cos, sin (P or 1, N, rotary dim); None: audio keys are not rotated
    text_start: Tensor | None  # (B,)
    num_keys: int  # text keys after this forward's are appended
    impl: str
    cached: dict[int, AudioKV] | None  # layer -> K, V, kept over one generate call; None: never kept
    consumed: set[int] = field(default_factory=set)

    def audio_kv(self, layer: int) -> AudioKV:
        """K and V (P, Hkv, N, D) of the audio in one layer, through the layer's own modules."""
        if self.cached is not None and layer in self.cached:
            return self.cached[layer]
        states = self.state.for_layer(layer)
        if states is None:
            raise ValueError(f"states must hold a tensor for layer {layer}, which takes audio, got None")
        key, value = project_audio(self.layers[layer], states)
        if self.layout.source is not None:
            key, value = key.index_select(0, self.layout.source), value.index_select(0, self.layout.source)
        if self.rotation is not None:
            key = rotate(self.layers[layer].self_attn, key, self.rotation)  # type: ignore[arg-type]
        if self.cached is not None:
            self.cached[layer] = key, value
        return key, value


def project_audio(layer: nn.Module, states: Tensor) -> AudioKV:
    """The layer's own norm and projections on states (A, N, d): K, not rotated, and V, both (A, Hkv, N, D)."""
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(states)  # type: ignore[operator]
    heads = (-1, attention.head_dim)
    key, value = (project(normed).unflatten(-1, heads) for project in (attention.k_proj, attention.v_proj))
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def rotate(attention: nn.Module, key: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE by the model's own function, which rotates queries and keys together: the queries are none here."""
    rotated: tuple[Tensor, Tensor] = _module_of(attention).apply_rotary_pos_emb(key[:, :0], key, *rotation)
    return rotated[1]


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
    lal_request: Request | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention signature; query (B, Hq, T, D) -> (B, T, Hq, D). Without a request, the stock function.

    The stock mask is not used: causality, padding and window are the kernel's.
    """
    if lal_request is None:
        if kwargs.get("audio") is not None:
            raise ValueError("audio must be given to the attached causal LM itself, got it in a call of another module")
        given = {"sliding_window": sliding_window, "softcap": softcap}
        kwargs |= {name: setting for name, setting in given.items() if setting is not None}
        stock = _stock_attention(module)
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    if dropout:
        raise ValueError(f"attention dropout must be 0 with audio: the kernels do not drop out, got {dropout}")
    for name in UNSUPPORTED_KEYWORDS:
        given_keyword = kwargs.get(name)
        if given_keyword is not None and given_keyword is not True:
            raise ValueError(f"{name} must not be given with audio: the kernels are causal over whole rows")
    layer: int = module.layer_idx  # type: ignore[assignment]
    audio_key, audio_value = lal_request.audio_kv(layer)
    layout, text_start = lal_request.layout, lal_request.text_start
    visible_from = None
    # A sliding-window cache has dropped its oldest keys: positions count from the first that is left.
    dropped = lal_request.num_keys - key.shape[2]
    if dropped < 0:
        raise ValueError(
            f"the cache must not be preallocated, got {key.shape[2]} keys for {lal_request.num_keys} tokens"
        )
    if layout.insert_at is not None:
        visible_from = layout.insert_at - dropped
        if text_start is not None:
            visible_from = visible_from + text_start.unsqueeze(1)
    if dropped and text_start is not None:
        text_start = (text_start - dropped).clamp(min=0)
    out = lal_attention(
        query,
        key,
        value,
        audio_key,
        audio_value,
        audio_lengths=layout.lengths,
        audio_index=layout.index,
        audio_visible_from=visible_from,
        text_start=text_start,
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
        impl=lal_request.impl,
    )
    assert isinstance(out, Tensor)
    lal_request.consumed.add(layer)
    return out.transpose(1, 2), None


def _stock_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    name = getattr(module.config, STOCK_CONFIG)._attn_implementation
    eager = _module_of(module).eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


def _module_of(attention: nn.Module) -> Any:
    """The modeling file that defines this attention, which holds its RoPE and its eager attention."""
    return sys.modules[type(attention).__module__]


AttentionInterface.register(ATTENTION_NAME, lal_attention_forward)
