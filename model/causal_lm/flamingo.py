"""Flamingo's way to let a causal LM take audio, for comparison with LAL: new layers before every n-th layer.

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
from transformers.modeling_layers import GradientCheckpointingLayer

from palkernels.model.causal_lm.attached import Attached, handle_of
from palkernels.model.causal_lm.gated_layer import AudioMask, FlamingoConfig, GatedLayer
from palkernels.model.causal_lm.layers import AudioKV, head_dim_of
from palkernels.model.causal_lm.patching import patch, unpatch
from palkernels.model.causal_lm.plan import make_plan
from palkernels.model.causal_lm.report import implementation
from palkernels.model.causal_lm.request import REQUEST_KEYWORD, Carried, Request
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.support import (
    base_model,
    check_reentrant,
    check_state,
    devices_of,
    find_decoder,
    find_rotary,
)
from palkernels.model.causal_lm.texts import Texts

# Older transformers checkpoint a layer's hooks with the layer; newer ones its forward alone.
HOOKS_ARE_CHECKPOINTED = "__call__" in vars(GradientCheckpointingLayer)


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
        heads, head_dim: of the cross-attention; None: those of the model's queries. Every head has its own keys.
        ffn_multiplier: the FFN is this many times as wide as the model.
        activation: of the FFN, by transformers' name; "relu2" is the squared ReLU of the paper.
        impl: the implementation of :func:`palkernels.lal_attention`.

    Raises:
        TypeError, ValueError: the model or a setting is not supported, or the model is attached already.
    """
    model = base_model(model)
    attached = handle_of(model)
    if attached is not None:
        by = type(attached).__name__
        raise ValueError(f"the model must be detached before it is attached again, got a model attached by {by}")
    model_config = find_decoder(model).config
    heads = model_config.num_attention_heads if heads is None else heads
    head_dim = head_dim_of(model_config) if head_dim is None else head_dim
    return FlamingoHandle(model, FlamingoConfig(every, heads, head_dim, ffn_multiplier, activation, impl))


@dataclass(eq=False, kw_only=True)
class FlamingoRequest(Request):
    """One forward's audio for the new layers."""

    new_layers: nn.ModuleDict  # by the index of the layer that each stands before
    _masks: tuple[AudioMask, Tensor | None] | None = field(default=None, init=False)

    def project(self, index: int) -> AudioKV:
        return self._gated(index).audio_kv(self.states_of(index))

    def positions(self) -> Tensor:
        return self.plan.positions(self.texts, shifted=False)

    def run_layer(self, index: int, hidden: Tensor) -> Tensor:
        """Return the text's states after the new layer that stands before layer ``index`` of the model."""
        updated: Tensor = self._gated(index)(hidden, self.audio_kv(index), *self.masks())
        return updated

    def masks(self) -> tuple[AudioMask, Tensor | None]:
        """Return who sees which audio, and which queries (B, T, 1) see any: None: all. Made once per forward."""
        if torch.compiler.is_compiling():  # the compiler computes it once anyway, and must not have to keep it
            return self._make_masks()
        if self._masks is None:
            self._masks = self._make_masks()
        return self._masks

    def _make_masks(self) -> tuple[AudioMask, Tensor | None]:
        layout, texts = self.plan.layout, self.texts
        visible_from = sees_audio = None
        text_index = self.plan.text_index(texts)
        if layout.lengths is not None or layout.insert_at is not None or not self.state.num_tokens:
            sees_audio = (layout.text_lengths > 0).unsqueeze(1).expand_as(text_index)
        if layout.insert_at is not None:
            visible_from = layout.insert_at + self.plan.start.unsqueeze(1) - texts.num_cached
            if sees_audio is not None and self.state.num_tokens:
                sees_audio = sees_audio & (text_index >= layout.insert_at[:, :1])
        text_start = torch.full((texts.batch,), texts.num_queries, device=texts.device)
        mask = AudioMask(text_start, layout.lengths, layout.index, visible_from)
        return mask, None if sees_audio is None else sees_audio.unsqueeze(2)

    def _gated(self, index: int) -> GatedLayer:
        return self.new_layers[str(index)]  # type: ignore[return-value]


class FlamingoHandle(Attached):
    """An attached model. ``detach()`` makes it a stock model again.

    Attributes:
        layers: the new layers, an ``nn.ModuleDict`` by the index of the layer that they stand before, in the model's
            dtype and each on that layer's device.
        selected: those indices.
        config: the settings.
    """

    def __init__(self, model: PreTrainedModel, config: FlamingoConfig) -> None:
        decoder = find_decoder(model)
        decoder_layers = list(decoder.layers)
        selected = tuple(range(config.every - 1, len(decoder_layers), config.every))
        super().__init__(model, decoder_layers, find_rotary(model, decoder), selected)
        self.config = config
        if not selected:
            raise ValueError(f"every must be at most the model's {len(decoder_layers)} layers, got {config.every}")
        embedding: Any = model.get_input_embeddings()
        width, dtype = embedding.weight.shape[1], embedding.weight.dtype
        self.layers = nn.ModuleDict()
        for index in selected:
            device = next(devices_of(decoder_layers[index]))
            self.layers[str(index)] = GatedLayer(width, config, device, dtype)
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
            for index, layer in enumerate(decoder_layers)
        ]
        patch(self)

    def detach(self) -> None:
        if not self.is_attached():
            return
        for hook in self._hooks:
            hook.remove()
        unpatch(self)

    def implementation(self) -> str:
        """Return the implementation that attends in the new layers, "none" where they would raise."""
        gate = self.layers[str(self.selected[0])].attention_gate
        heads, head_dim, impl = self.config.heads, self.config.head_dim, self.config.impl
        return implementation(heads, heads, head_dim, gate.dtype, gate.device, impl)[0]  # type: ignore[arg-type]

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run the new layer, if one stands before this layer of the model, which never sees the request."""
        carried: Carried | None = kwargs.get(REQUEST_KEYWORD)
        if carried is None:
            return None
        kwargs = {name: argument for name, argument in kwargs.items() if name != REQUEST_KEYWORD}
        if index not in self.selected:
            return args, kwargs
        hidden, *rest = args
        request: FlamingoRequest = carried.request  # type: ignore[assignment]
        run_layer = partial(request.run_layer, index)
        checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
        if checkpointed and not HOOKS_ARE_CHECKPOINTED:
            hidden = checkpoint(run_layer, hidden, use_reentrant=False)
        else:
            hidden = run_layer(hidden)
        request.consumed.add(index)
        return (hidden, *rest), kwargs

    def forward(self, audio: AudioState, arguments: dict[str, Any]) -> Any:
        return self.run(self.request(audio, Texts.of(arguments), keep=False), arguments)

    def request(self, state: AudioState, texts: Texts, *, keep: bool) -> FlamingoRequest:
        check_state(state, self.model, len(self.decoder_layers), self.selected)
        if self.model.training:
            check_reentrant(self.decoder_layers)
        plan = make_plan(state, texts, rotated=False, training=self.model.training)
        return FlamingoRequest(state, plan, texts, {} if keep else None, new_layers=self.layers)
