"""The handle of a model that LAL is attached to."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels.model.causal_lm.attached import Attached
from palkernels.model.causal_lm.attention import ATTENTION_NAME, STOCK_CONFIG
from palkernels.model.causal_lm.caches import cache_of
from palkernels.model.causal_lm.config import LalConfig
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
    """

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
        self.connector = connector
        self.projectors = None if projectors is None else dict(projectors)
        if self.projectors is not None and set(self.projectors) != set(self.selected):
            raise ValueError(
                f"projectors must be given for layers {list(self.selected)}, got {sorted(self.projectors)}"
            )
        check_order(model, layers)
        self._fast_path = FastPath(layers, {i: check_layer(model, layers[i], i, self.rotary) for i in self.selected})

        self._stock_configs: dict[int, Any] = {}
        for index in self.selected:
            attention: Any = layers[index].self_attn
            self._stock_configs[index] = attention.config
            config_with_audio = copy.copy(attention.config)
            setattr(config_with_audio, STOCK_CONFIG, attention.config)
            config_with_audio._attn_implementation = ATTENTION_NAME
            attention.config = config_with_audio
        patch(self)

    def detach(self) -> None:
        if not self.is_attached():
            return
        for index, stock in self._stock_configs.items():
            attention: Any = self.decoder_layers[index].self_attn
            attention.config = stock
        unpatch(self)

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
        from palkernels.model.connectors.base import Connector  # attach alone needs no connector

        states: Any = encoded
        if isinstance(self.connector, Connector):
            states, lengths = self.connector.connect(encoded, lengths)
        elif self.connector is not None:
            states = self.connector(encoded)
        if self.projectors is not None:
            projectors = (self.projectors.get(layer) for layer in range(len(self.decoder_layers)))
            states = [None if projector is None else projector(states) for projector in projectors]
        return AudioState(states, lengths, index, insert_at)

    def save(self, directory: "str | os.PathLike[str]") -> Path:
        """Write settings, connector and projectors to ``directory/lal.safetensors``, for ``attach(model, directory)``.

        The language model is not in it: ``model.save_pretrained`` saves that, as a stock model.
        """
        return save(directory, self.model, self.config, self.connector, self.projectors)

    def report(self) -> LalReport:
        """Say per layer whether it sees audio, what attends and why not Triton, what projects and why not audio_kv."""
        return make_report(self.model, self.decoder_layers, self.selected, self.config, self._fast_path.why_not())

    def forward(self, audio: AudioState, arguments: dict[str, Any]) -> Any:
        request = self.request(audio, Texts.of(arguments), keep=False)
        return self.run(request, arguments | {"position_ids": request.positions()})

    def run(self, request: Request, arguments: dict[str, Any]) -> Any:
        self._check_new_values()
        if arguments.get("attention_mask") is None and cache_of(arguments) is None:
            # Without a mask, transformers reads a jump in position_ids as the start of another packed sequence.
            arguments["attention_mask"] = torch.ones_like(arguments["position_ids"])
        return super().run(request, arguments)

    def request(self, state: AudioState, texts: Texts, *, keep: bool) -> LalRequest:
        self._check(state, texts)
        rotated = self.config.rope == "sequence" and bool(self.selected)
        plan = make_plan(
            state,
            texts,
            rotated=rotated,
            training=self.model.training,
            rope_by_length=rotated and self.rotary.depends_on_length,
        )
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

    def _check_new_values(self) -> None:
        """Compare the layers that attach could not, now that their weights may have values."""
        checks = self._fast_path.checks
        unchecked = [index for index, check in checks.items() if check is None]
        if unchecked and torch.compiler.is_compiling():
            raise RuntimeError("a model that was attached without values must run with audio before it is compiled")
        for index in unchecked:
            checks[index] = check_layer(self.model, self.decoder_layers[index], index, self.rotary)
