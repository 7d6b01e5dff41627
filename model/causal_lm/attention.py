"""The attention function that an attached model's layers call, and what one forward carries to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from palkernels import lal_attention
from palkernels.model.causal_lm.fast_path import project_fused
from palkernels.model.causal_lm.layers import AudioKV, Rotation, modeling_file, project_audio, rotate
from palkernels.model.causal_lm.plan import Plan
from palkernels.model.causal_lm.state import AudioState
from palkernels.recompute import recomputed

# "sdpa" or "flex_attention" within the name would trigger transformers' capability checks for those.
ATTENTION_NAME = "palkernels_lal"
STOCK_CONFIG = "_palkernels_stock_config"  # on a selected layer's copied config: the config it replaced
REQUEST_KEYWORD = "lal_request"
# Keywords of transformers' attention functions that change what is seen; is_causal=True changes nothing.
UNSUPPORTED_KEYWORDS = ("is_causal", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(eq=False)
class Request:
    """One forward's audio, ready for every layer. Not a tensor, so that transformers hands it through untouched."""

    state: AudioState
    plan: Plan
    layers: list[nn.Module]
    rotations: tuple[Rotation | None, ...]  # per layer: cos, sin (P or 1, N, R); None: keys are not rotated
    num_keys: int | Tensor  # text keys after this forward's are appended; a tensor where the cache counts on the device
    impl: str
    recompute: bool  # keep no K and V for the backward pass
    norm_offset: float | None  # of the layers' norms where audio_kv takes their weights; None: their modules are called
    cached: dict[int, AudioKV] | None  # layer -> K, V, kept over one generate call; None: never kept
    consumed: set[int] = field(default_factory=set)
    ran: bool = False

    def audio_kv(self, layer: int) -> AudioKV:
        """K and V (P, Hkv, N, D) of the audio in one layer."""
        if self.cached is not None and layer in self.cached:
            return self.cached[layer]
        found = self.project(layer)
        if self.cached is not None:
            self.cached[layer] = found
        return found

    def project(self, layer: int) -> AudioKV:
        """The same, made anew."""
        if self.norm_offset is None:
            return self.placed(layer, *project_audio(self.layers[layer], self.states_of(layer)))
        return self.project_fused([layer])[layer]

    def states_of(self, layer: int) -> Tensor:
        """The states (A, N, d) that one layer takes."""
        states = self.state.for_layer(layer)
        if states is None:
            raise ValueError(f"states must hold a tensor for layer {layer}, which takes audio, got None")
        return states

    def project_fused(self, layers: Sequence[int]) -> dict[int, AudioKV]:
        """K and V of plain layers that share their states, by one audio_kv. It keeps its arguments alone for the
        backward pass, where the modules keep several times as much as K and V."""
        assert self.norm_offset is not None
        placed_later = self.plan.layout.source is not None  # a row of keys is rotated for each of its places
        rotations = [None if placed_later else self.rotations[layer] for layer in layers]
        modules = [self.layers[layer] for layer in layers]
        found = project_fused(modules, self.states_of(layers[0]), self.norm_offset, rotations, self.impl)
        if placed_later:
            found = [self.placed(layer, *kv) for layer, kv in zip(layers, found, strict=True)]
        return dict(zip(layers, found, strict=True))

    def placed(self, layer: int, key: Tensor, value: Tensor) -> AudioKV:
        """From one row per audio row to one per distinct (audio row, place), keys rotated for their place."""
        source, rotation = self.plan.layout.source, self.rotations[layer]
        if source is not None:
            key, value = key.index_select(0, source), value.index_select(0, source)
        if rotation is not None:
            key = rotate(self.layers[layer].self_attn, key, rotation)  # type: ignore[arg-type]
        return key, value


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
    layout = lal_request.plan.layout
    dropped, text_end = _place_of_keys(lal_request.num_keys, key)
    text_start, visible_from = lal_request.plan.text_start, None
    if layout.insert_at is not None:
        visible_from = layout.insert_at - dropped
        if text_start is not None:
            visible_from = visible_from + text_start.unsqueeze(1)
    if text_start is not None:
        text_start = (text_start - dropped).clamp(min=0)

    # A layer that is checkpointed as a whole keeps nothing anyway.
    whole = getattr(lal_request.layers[layer], "gradient_checkpointing", False) and module.training
    if lal_request.recompute and torch.is_grad_enabled() and not whole:
        states = lal_request.states_of(layer)
        audio_key, audio_value = recomputed(lambda _: lal_request.project(layer), states)
    else:
        audio_key, audio_value = lal_request.audio_kv(layer)
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
        text_end=text_end,
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
        impl=lal_request.impl,
    )
    lal_request.consumed.add(layer)
    return out.transpose(1, 2), None


def _place_of_keys(num_keys: int | Tensor, key: Tensor) -> tuple[int | Tensor, Tensor | None]:
    """How many of the text's oldest keys a sliding-window cache has dropped, and where the others end (B,) in ``key``,
    None at its end: positions count from the first key that is left, and a preallocated cache is longer than them."""
    room = key.shape[2]
    if isinstance(num_keys, Tensor):
        return (num_keys - room).clamp(min=0), num_keys.clamp(max=room).expand(key.shape[0])
    if num_keys >= room:
        return num_keys - room, None
    return 0, key.new_full((key.shape[0],), num_keys, dtype=torch.long)


def _stock_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    name = getattr(module.config, STOCK_CONFIG)._attn_implementation
    eager = modeling_file(module).eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


AttentionInterface.register(ATTENTION_NAME, lal_attention_forward)
