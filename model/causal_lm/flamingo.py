"""Flamingo's way to let a causal LM take audio, for comparison with LAL: layers of their own before every n-th layer.

A new layer attends from the text to the audio and has an FFN; tanh gates that begin at 0 add both to the text's states,
so that a model begins as the stock one (Flamingo, arXiv 2204.14198, section 2.2). Everything else is as in
LAL's :mod:`~palkernels.model.causal_lm.attach`: the stock model's modules and weights stay, ``forward`` and
``generate`` of this one instance learn ``audio=``, and without audio the stock functions run.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from palkernels import lal_attention
from palkernels.dispatch import IMPLEMENTATIONS
from palkernels.model.causal_lm.attach import HANDLE, Attached, base_model
from palkernels.model.causal_lm.attention import REQUEST_KEYWORD, Request
from palkernels.model.causal_lm.generation import keys_in
from palkernels.model.causal_lm.layers import AudioKV, Rotary, Rotation
from palkernels.model.causal_lm.plan import Plan, make_plan, texts_of
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.support import check_reentrant, check_state, devices_of, find_decoder, find_rotary

__all__ = ["FlamingoConfig", "FlamingoHandle", "GatedLayer", "attach_flamingo"]

# Older transformers checkpoint a layer's hooks with the layer; newer ones its forward alone.
HOOKS_ARE_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)


@dataclass(frozen=True)
class FlamingoConfig:
    """The settings of :func:`attach_flamingo`, those that the model gives included."""

    every: int
    heads: int
    head_dim: int
    ffn_multiplier: int
    activation: str
    impl: str

    def __post_init__(self) -> None:
        for name in ("every", "heads", "head_dim", "ffn_multiplier"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.activation not in ACT2FN:
            raise ValueError(f"activation must be one that transformers knows, got {self.activation!r}")
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {self.impl!r}")


def attach_flamingo(
    model: PreTrainedModel,
    every: int = 4,
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    ffn_multiplier: int = 4,
    activation: str = "relu2",
    impl: str = "auto",
) -> "FlamingoHandle":
    """Let a causal LM take ``audio=AudioState(...)`` in ``forward`` and ``generate``, by gated cross-attention.

    The model is changed in place. The new parameters are not its own: train ``handle.layers.parameters()``, and save
    and load ``handle.layers.state_dict()``; ``model.save_pretrained`` saves a stock model. ``model.to`` and
    ``model.half`` do not reach them either. A peft model is attached by its base model.

    Args:
        every: a new layer stands before the n-th, 2n-th, ... layer (of ``range(every - 1, num_layers, every)``).
        heads, head_dim: of the cross-attention; None: the model's own query heads. Every head has its own keys.
        ffn_multiplier: the FFN is this many times as wide as the model.
        activation: of the FFN, by transformers' name; "relu2" is the squared ReLU of the paper.
        impl: the implementation of :func:`palkernels.lal_attention`.

    Raises:
        TypeError, ValueError: the model or a setting is not supported, or the model is attached already.
    """
    model = base_model(model)
    attached = getattr(model, HANDLE, None)
    if attached is not None:
        raise ValueError(f"the model must be detached before it is attached again, got a {type(attached).__name__}'s")
    own = find_decoder(model).config
    heads = own.num_attention_heads if heads is None else heads
    if head_dim is None:
        head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    return FlamingoHandle(model, FlamingoConfig(every, heads, head_dim, ffn_multiplier, activation, impl))


class GatedLayer(nn.Module):
    """One new layer. With y the text's states (B, T, d), x the audio's (A, N, d):

        y = y + tanh(attention_gate) W_o softmax(scale * W_q norm(y) (W_k x)^T, masked) W_v x
        y = y + tanh(ffn_gate) FFN(norm(y))

    Norms are LayerNorms; the audio has none but its connector's. A query that sees no audio is left as it was by both:
    so a text without audio, and what stands before the audio, is the stock model's. (The paper's FFN takes those too.)
    Positions of the audio are not told, as in the paper.
    """

    def __init__(
        self,
        hidden_size: int,
        config: FlamingoConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, wide = config.heads * config.head_dim, config.ffn_multiplier * hidden_size
        self.heads, self.head_dim, self.impl = config.heads, config.head_dim, config.impl
        self.attention_norm = nn.LayerNorm(hidden_size, **made)
        self.q_proj = nn.Linear(hidden_size, inner, bias=False, **made)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False, **made)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False, **made)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False, **made)
        self.attention_gate = nn.Parameter(torch.zeros(1, **made))
        self.ffn_norm = nn.LayerNorm(hidden_size, **made)
        self.up_proj = nn.Linear(hidden_size, wide, bias=False, **made)
        self.activation: nn.Module = ACT2FN[config.activation]
        self.down_proj = nn.Linear(wide, hidden_size, bias=False, **made)
        self.ffn_gate = nn.Parameter(torch.zeros(1, **made))

    def audio_kv(self, states: Tensor) -> AudioKV:
        """K and V, both (A, H, N, D), of states (A, N, d)."""
        return self._heads(self.k_proj(states)), self._heads(self.v_proj(states))

    def forward(self, hidden: Tensor, audio_kv: AudioKV, seen: Tensor | None, **masks: Any) -> Tensor:
        """``seen`` (B, T, 1), bool: the queries that see audio, None: all. ``masks`` are those of lal_attention, query
        positions counted from 0."""
        query = self._heads(self.q_proj(self.attention_norm(hidden)))
        unseen = query.detach()  # the text's keys must be there, but begin behind its last query
        text_start = torch.full((hidden.shape[0],), hidden.shape[1], device=hidden.device)
        attended = lal_attention(query, unseen, unseen, *audio_kv, text_start=text_start, impl=self.impl, **masks)
        assert isinstance(attended, Tensor)
        updated = hidden + self.attention_gate.tanh() * self.o_proj(attended.transpose(1, 2).flatten(2))
        wide = self.activation(self.up_proj(self.ffn_norm(updated)))
        updated = updated + self.ffn_gate.tanh() * self.down_proj(wide)
        return updated if seen is None else torch.where(seen, updated, hidden)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], self.heads, self.head_dim).transpose(1, 2)


@dataclass(eq=False)
class FlamingoRequest(Request):
    """One forward's audio, for the new layers."""

    gated: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    def project(self, layer: int) -> AudioKV:
        found: AudioKV = self.gated[str(layer)].audio_kv(self.states_of(layer))  # type: ignore[operator]
        return found

    def through(self, layer: int, hidden: Tensor) -> Tensor:
        """The text's states after the new layer that stands before this one."""
        updated: Tensor = self.gated[str(layer)](hidden, self.audio_kv(layer), **self.masks(hidden.shape[1]))
        return updated

    def masks(self, num_queries: int) -> dict[str, Tensor | None]:
        """What GatedLayer is told of who sees what."""
        layout, start, past = self.plan.layout, self.plan.start.unsqueeze(1), self.num_keys - num_queries
        visible_from = seen = None
        if layout.lengths is not None or layout.insert_at is not None or not self.state.num_tokens:
            own = self.plan.text_index(past, num_queries)
            seen = (layout.text_lengths > 0).unsqueeze(1).expand_as(own)
        if layout.insert_at is not None:
            visible_from = layout.insert_at + start - past
            if seen is not None and self.state.num_tokens:
                seen = seen & (own >= layout.insert_at[:, :1])
        return {
            "seen": None if seen is None else seen.unsqueeze(2),
            "audio_lengths": layout.lengths,
            "audio_index": layout.index,
            "audio_visible_from": visible_from,
        }


class FlamingoHandle(Attached):
    """An attached model. ``detach()`` makes it a stock model again.

    Attributes:
        layers: the new layers, an ``nn.ModuleDict`` by the index of the layer that they stand before, in the model's
            dtype and each on that layer's device.
        selected: those indices.
        config: the settings.
    """

    def __init__(self, model: PreTrainedModel, config: FlamingoConfig) -> None:
        self.model = model
        self.config = config
        decoder = find_decoder(model)
        self.decoder_layers: list[nn.Module] = list(decoder.layers)
        self.rotary: Rotary = find_rotary(model, decoder)
        self.selected = tuple(range(config.every - 1, len(self.decoder_layers), config.every))
        if not self.selected:
            raise ValueError(f"every must be at most the model's {len(self.decoder_layers)} layers, got {config.every}")
        embedding: Any = model.get_input_embeddings()
        width, dtype = embedding.weight.shape[1], embedding.weight.dtype
        self.layers = nn.ModuleDict()
        for index in self.selected:
            device = next(devices_of(self.decoder_layers[index]))
            self.layers[str(index)] = GatedLayer(width, config, device, dtype)
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True)
            for index, layer in enumerate(self.decoder_layers)
        ]
        self.patch()

    def detach(self) -> None:
        """Make the model a stock one again; a second call does nothing."""
        if getattr(self.model, HANDLE, None) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        self.unpatch()

    def _before(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a layer of the model: through the new one, if one stands here. The layer never sees the request."""
        request: FlamingoRequest | None = kwargs.get(REQUEST_KEYWORD)
        if request is None:
            return None
        kwargs = {name: given for name, given in kwargs.items() if name != REQUEST_KEYWORD}
        if index not in self.selected:
            return args, kwargs
        hidden, *rest = args
        through = partial(request.through, index)
        checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
        if checkpointed and not HOOKS_ARE_CHECKPOINTED:
            hidden = checkpoint(through, hidden, use_reentrant=False)
        else:
            hidden = through(hidden)
        request.consumed.add(index)
        return (hidden, *rest), kwargs

    def forward(self, audio: AudioState, arguments: dict[str, Any]) -> Any:
        """One forward with audio; ``arguments`` by name."""
        inputs = texts_of(arguments)
        batch, num_queries = inputs.shape[:2]
        past = keys_in(arguments.get("past_key_values"), inputs.device)
        plan = self.plan(audio, 1, arguments, batch, past, num_queries, inputs.device)
        return self.run(self.request(audio, plan, (), past + num_queries, None), arguments)

    def plan(
        self,
        state: AudioState,
        copies: int,
        arguments: dict[str, Any],
        batch: int,
        past: int | Tensor,
        num_queries: int,
        device: torch.device,
    ) -> Plan:
        """Check what a forward was given, and work out what its mask and state mean."""
        check_state(state, self.model, len(self.decoder_layers), self.selected)
        if self.model.training:
            check_reentrant(self.model, self.decoder_layers)
        training = self.model.training
        return make_plan(state, copies, arguments, batch, past, num_queries, device, rotated=False, training=training)

    def positions(self, plan: Plan, past: int | Tensor, num_queries: int) -> Tensor:
        """Positions of the text (B, T): its own, the audio takes none."""
        return plan.positions(past, num_queries, shifted=False)

    def rotations(
        self, state: AudioState, plan: Plan, past: int | Tensor, num_queries: int
    ) -> tuple[Rotation | None, ...]:
        """None: the audio's keys are not rotated."""
        return ()

    def request(
        self,
        state: AudioState,
        plan: Plan,
        rotations: tuple[Rotation | None, ...],
        num_keys: int | Tensor,
        cached: dict[int, AudioKV] | None,
    ) -> FlamingoRequest:
        impl, gated = self.config.impl, self.layers
        return FlamingoRequest(
            state, plan, self.decoder_layers, rotations, num_keys, impl, False, None, cached, gated=gated
        )

    def project_at_once(self, request: Request) -> dict[int, AudioKV]:
        """Nothing: every new layer projects where it first runs."""
        return {}
