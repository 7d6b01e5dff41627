"""The handle of a model that LAL is attached to."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels.model.causal_lm.attached import Attached
from palkernels.model.causal_lm.attention import ATTENTION_NAME, STOCK_CONFIG
from palkernels.model.causal_lm.audio_parts import CONNECTOR, AudioParts, check_widths, unwrapped
from palkernels.model.causal_lm.caches import cache_of
from palkernels.model.causal_lm.config import LalConfig
from palkernels.model.causal_lm.encoded import EncodedAudio
from palkernels.model.causal_lm.fast_path import FastPath
from palkernels.model.causal_lm.layers import Rotation
from palkernels.model.causal_lm.patching import patch, unpatch
from palkernels.model.causal_lm.plan import Plan, make_plan
from palkernels.model.causal_lm.report import LalReport, make_report
from palkernels.model.causal_lm.request import LalRequest, Request
from palkernels.model.causal_lm.saving import save
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.support import (
    check_layer,
    check_order,
    check_reentrant,
    check_state,
    find_decoder,
    find_rotary,
)
from palkernels.model.causal_lm.texts import Texts


class LalHandle(Attached):
    """An attached model. ``detach()`` makes it a stock model again, ``report()`` says what runs, ``save()`` keeps the
    settings, the connector and the projectors.

    Attributes:
        model: the model.
        config: the settings.
        selected: the indices of the layers that take audio.
        connector: turns an encoder's states into the model's; or None.
        projectors: by layer, turn the connector's output into the layer's states; or None.
        owner: the class of the model that holds this one together with its connectors; None: this one stands alone.

    Connector and projectors are the model's submodule ``palkernels_audio`` until ``detach``.
    """

    owner: str | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        config: LalConfig,
        connector: nn.Module | None = None,
        projectors: Mapping[int, nn.Module] | None = None,
    ) -> None:
        decoder = find_decoder(model)
        layers = list(decoder.layers)
        super().__init__(model, layers, find_rotary(model, decoder), config.selected(len(layers)))
        self.config = config
        if projectors is not None and set(projectors) != set(self.selected):
            raise ValueError(f"projectors must be given for layers {list(self.selected)}, got {sorted(projectors)}")
        check_widths(connector, projectors, model.config.get_text_config().hidden_size)
        check_order(model, layers)
        self._fast_path = FastPath(layers, {i: check_layer(model, layers[i], i, self.rotary) for i in self.selected})

        if connector is not None or projectors is not None:
            self.add_parts(AudioParts(connector, projectors))
        self._forwards = {index: forwards_of(layers[index]) for index in self.selected}
        self._stock_configs: dict[int, Any] = {}
        for index in self.selected:
            self._take_attention(index)
        patch(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles which functions the layers run: a copy looks at its own, once."""
        return {**vars(self), "_forwards": {}}

    def _take_attention(self, index: int) -> None:
        """Give one layer's attention a config that names our attention function."""
        attention: Any = self.decoder_layers[index].self_attn
        self._stock_configs[index] = attention.config
        config = copy.copy(attention.config)
        setattr(config, STOCK_CONFIG, attention.config)
        config._attn_implementation = ATTENTION_NAME
        attention.config = config

    def _take_other_attention(self) -> None:
        """Let layers that see no audio attend to packed texts, too, for which stock functions would need a mask.

        Raises:
            ValueError: a layer's attention is more than ours.
        """
        for index, layer in enumerate(self.decoder_layers):
            if index in self._stock_configs:
                continue
            try:
                check_layer(self.model, layer, index, self.rotary)
            except ValueError as error:
                raise ValueError(
                    f"packed sequences must be given to layers that are all like Llama's: {error}"
                ) from error
            self._take_attention(index)

    def detach(self) -> None:
        if not self.is_attached():
            return
        for index, stock in self._stock_configs.items():
            attention: Any = self.decoder_layers[index].self_attn
            attention.config = stock
        self.remove_parts()
        unpatch(self)

    @property
    def connector(self) -> nn.Module | None:
        module: nn.Module | None = unwrapped(getattr(unwrapped(self.parts), CONNECTOR, None))
        return module

    @property
    def projectors(self) -> dict[int, nn.Module] | None:
        projectors = getattr(unwrapped(self.parts), "projectors", None)
        return {int(layer): unwrapped(module) for layer, module in projectors.items()} if projectors else None

    def state(
        self,
        encoded: Tensor | tuple[Tensor, ...],
        lengths: Tensor | None = None,
        index: Tensor | None = None,
        insert_at: Tensor | None = None,
    ) -> AudioState:
        """Make the :class:`AudioState` of an encoder's states, by the connector and the projectors that there are.

        Args:
            encoded: (A, N, input size), or a tuple of them where a connector of ours joins several encoders.
            lengths: (A,) valid states of the encoder, of several those of the first. A connector of ours turns them
                into the valid tokens of its output.
            index, insert_at: as in AudioState.
        """
        parts, states = self.parts, cast(Any, encoded)
        if parts is not None:
            states, lengths = parts(encoded, lengths)
        if isinstance(states, dict):
            states = [states.get(layer) for layer in range(len(self.decoder_layers))]
        return AudioState(states, lengths, index, insert_at)

    def save(self, directory: "str | os.PathLike[str]") -> Path:
        """Write settings, connector and projectors to ``directory/lal.safetensors``, for ``attach(model, directory)``.

        The language model is not in it: ``model.save_pretrained`` saves that, and writes this file too where there is
        a connector or projectors. Under FSDP2 all processes must call it.

        Raises:
            ValueError: the model belongs to an audio LLM, whose connectors this handle does not hold; or a connector
                holds peft's adapters.
        """
        return self.save_parts(directory, None)

    def save_parts(self, directory: "str | os.PathLike[str]", state_dict: Mapping[str, Tensor] | None) -> Path:
        """Write the file of :meth:`save`, the weights from the model's state dict if that is given."""
        if self.owner is not None:
            raise ValueError(
                f"handle.save must be called on a model that stands alone: save_pretrained of the {self.owner} saves "
                "the language model, the connectors and all settings"
            )
        return save(directory, self.model, self.config, self.connector, self.projectors, state_dict)

    def report(self) -> LalReport:
        """Say per layer whether it sees audio, what attends and why not Triton, what projects and why not audio_kv."""
        selected = self.selected if self.is_attached() else ()
        return make_report(self.model, self.decoder_layers, selected, self.config, self._fast_path.why_not())

    def connected(self, audio: object) -> Any:
        if not isinstance(audio, EncodedAudio) or self._parts is None:
            return super().connected(audio)
        return self.state(audio.encoded, audio.lengths, audio.index, audio.insert_at)

    def begin(self, audio: AudioState, arguments: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
        request = self.request(audio, Texts.of(arguments), keep=False)
        return request, arguments | {"position_ids": request.positions()}

    def prepared(self, request: Request, arguments: dict[str, Any]) -> dict[str, Any]:
        if request.plan.packing is not None:
            self._take_other_attention()
            arguments = arguments | {"attention_mask": unread_mask(request), "use_cache": False}
        elif arguments.get("attention_mask") is not None:
            routed = arguments.get("output_router_logits")
            if routed is None:
                routed = getattr(self.model.config, "output_router_logits", False)
            # The loss of a router leaves padding out by the mask; no layer that takes audio looks at it.
            if not routed and len(self.selected) == len(self.decoder_layers):
                arguments = arguments | {"attention_mask": unread_mask(request)}
        elif cache_of(arguments) is None:
            # Without a mask, transformers reads a jump in position_ids as the start of another packed sequence.
            arguments = arguments | {"attention_mask": torch.ones_like(arguments["position_ids"])}
        return super().prepared(request, arguments)

    def request(self, state: AudioState, texts: Texts, *, keep: bool) -> LalRequest:
        self._check(state, texts)
        self.check_layers()  # what it finds decides how audio is projected, in the first forward, too
        rotated = self.config.rope == "sequence" and bool(self.selected)
        plan = make_plan(
            state,
            texts,
            rotated=rotated,
            training=self.model.training,
            rope_by_length=rotated and self.rotary.depends_on_length,
            packable=True,
        )
        if plan.holes:
            self.check_holes(texts, keep=keep)
        if plan.packing is not None and self.config.recompute_audio_kv:
            raise ValueError("recompute_audio_kv must be False with packed sequences, got True")
        request = LalRequest(
            state,
            plan,
            texts,
            {} if keep else None,
            modules=self.decoder_layers,
            selected=self.selected,
            rotations=self._rotations(state, plan, texts),
            shifted=self.config.rope == "sequence",
            impl=self.config.impl,
            recompute=self.config.recompute_audio_kv,
            norm_offset=self._fast_path.norm_offset(state.device.type),
            in_eight_bits=self.config.audio_kv_dtype is not None,
        )
        request.project_at_once()
        return request

    def _check(self, state: AudioState, texts: Texts) -> None:
        """Refuse audio and settings that the model cannot run with."""
        check_state(state, self.model, len(self.decoder_layers), self.selected)
        if texts.output_attentions or getattr(self.model.config, "output_attentions", False):
            raise ValueError("output_attentions must be off with audio: the kernels do not form attention weights")
        if not self.model.training:
            return
        layers: list[Any] = [self.decoder_layers[index] for index in self.selected]
        check_reentrant(layers)
        if any(getattr(layer.self_attn, "attention_dropout", 0.0) for layer in layers):
            raise ValueError("attention_dropout must be 0 in training with audio: the kernels do not drop out")

    def _rotations(self, state: AudioState, plan: Plan, texts: Texts) -> tuple[Rotation | None, ...]:
        """Return, per layer, cos and sin of the audio's positions, None where its keys are not rotated."""
        if self.config.rope == "none" or not self.selected:
            return (None,) * len(self.decoder_layers)
        longest = plan.positions(texts, shifted=True).max() if self.rotary.depends_on_length else None
        like = state.for_layer(self.selected[0])
        assert like is not None  # the state was checked
        return self.rotary.of_layers(self.selected, like, plan.layout.positions, longest)

    def check_layers(self) -> None:
        """Compare the layers that attach could not, now that their weights may have values, and those whose forward
        somebody has replaced. Under FSDP2 this gathers weights, so that all processes must do it.

        Raises:
            ValueError: a layer computes something else than at attach.
        """
        checks = self._fast_path.checks
        unchecked = [index for index, check in checks.items() if check is None]
        if torch.compiler.is_compiling():
            if unchecked:
                raise RuntimeError("a model that was attached without values must run with audio before it is compiled")
            return
        forwards = {index: forwards_of(self.decoder_layers[index]) for index in self.selected}
        if not unchecked and forwards == self._forwards:
            return
        replaced = [index for index in self.selected if forwards[index] != self._forwards.get(index)]
        for index in sorted({*unchecked, *replaced}):
            try:
                checks[index] = check_layer(self.model, self.decoder_layers[index], index, self.rotary)
            except ValueError as error:
                if index not in replaced:
                    raise
                raise ValueError(
                    f"layer {index} must compute what it did at attach, but its forward was replaced: apply what "
                    f"replaces it first, then attach again ({error})"
                ) from error
        self._forwards = forwards


def unread_mask(request: Request) -> Tensor:
    """Return a mask of four dimensions: transformers takes it as it is, where it would read a given one's values."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=request.texts.device)


def forwards_of(layer: Any) -> tuple[Any, ...]:
    """Return the functions that a layer and its attention run, to be compared with those of another time."""
    attention = layer.self_attn
    own, of_attention = vars(layer).get("forward"), vars(attention).get("forward")
    return attention, own_class(layer).forward, own, own_class(attention).forward, of_attention


def own_class(module: nn.Module) -> Any:
    """Return a module's class, sharded or not: FSDP2 derives one with a copy of its forward."""
    for base in type(module).__mro__:
        if not base.__module__.startswith("torch."):
            return base
    return type(module)
