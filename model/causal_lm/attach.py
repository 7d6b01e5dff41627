"""Drop-in: :func:`attach` lets a stock Hugging Face causal LM take audio as extra keys and values (LAL).

The model's modules and weights stay as they are. Each selected layer's attention gets a copy of its config that names
our attention function; ``forward`` and ``generate`` of this one instance learn the keyword ``audio=``. Without audio
the stock functions run.
"""

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels import unsupported_reasons
from palkernels.attention.checks import IMPLEMENTATIONS
from palkernels.model.causal_lm.attention import ATTENTION_NAME, REQUEST_KEYWORD, STOCK_CONFIG, Request
from palkernels.model.causal_lm.fast_path import alike, norms_of, why_not_plain
from palkernels.model.causal_lm.generation import check_unchanged, current, generate, keys_in
from palkernels.model.causal_lm.layers import AudioKV, Rotary, Rotation, num_kv_heads
from palkernels.model.causal_lm.plan import Plan, make_plan, texts_of
from palkernels.model.causal_lm.saving import load, named_modules, save
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.support import (
    check_layer,
    check_order,
    check_reentrant,
    check_state,
    devices_of,
    find_decoder,
    find_rotary,
)

HANDLE = "_palkernels_handle"


@dataclass(frozen=True)
class LalConfig:
    """How audio enters the model.

    Args:
        layers: "all", or the indices of the layers that see audio; delayed LAL is ``range(4, num_layers)``.
        rope: "sequence" gives audio keys the positions they would have if the audio stood in the text, and shifts
            the text behind it; "none" leaves audio keys as projected and text positions as they are. The paper does
            not say which it uses; the default follows its closest public relatives.
        impl: the implementation of :func:`palkernels.lal_attention` and :func:`palkernels.audio_kv`.
        recompute_audio_kv: in training, keep no audio keys and values for the backward pass but project them again
            there, through the same modules. Saves 2 x Hkv x D numbers per audio token and layer, and more where
            adapters keep their own.
    """

    layers: str | Iterable[int] = "all"
    rope: str = "sequence"
    impl: str = "auto"
    recompute_audio_kv: bool = False

    def __post_init__(self) -> None:
        if self.layers != "all":
            if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
                raise ValueError(f'layers must be "all" or layer indices, got {self.layers!r}')
            layers = tuple(self.layers)
            if any(isinstance(x, bool) or not isinstance(x, int) for x in layers) or len(set(layers)) < len(layers):
                raise ValueError(f"layers must be distinct integers, got {layers}")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        if self.rope not in ("sequence", "none"):
            raise ValueError(f'rope must be "sequence" or "none", got {self.rope!r}')
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {self.impl!r}")
        if not isinstance(self.recompute_audio_kv, bool):
            raise TypeError(f"recompute_audio_kv must be a bool, got {self.recompute_audio_kv!r}")


@dataclass(frozen=True)
class LayerReport:
    """What one layer runs when the model is given audio."""

    layer: int
    audio: bool  # whether the layer sees audio
    impl: str  # the implementation; "stock" where the layer sees no audio, "none" where it would raise
    why_not_triton: tuple[str, ...]  # empty where triton runs
    why_not_fused: str | None  # None where audio_kv can project the audio

    @property
    def audio_kv(self) -> str:
        """What projects audio: "fused" (audio_kv; under autocast or torch.compile the modules), "modules" (the layer's
        own), or "none" where the layer sees no audio."""
        if not self.audio:
            return "none"
        return "modules" if self.why_not_fused else "fused"


@dataclass(frozen=True)
class LalReport:
    """What :meth:`LalHandle.report` returns; ``str`` of it is a table."""

    model: str
    rope: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}, rope={self.rope!r}", "layer  audio  implementation  audio_kv"]
        lines += [f"{x.layer:5}  {'yes' if x.audio else 'no':5}  {x.impl:14}  {x.audio_kv}" for x in self.layers]
        reasons = dict.fromkeys(reason for layer in self.layers for reason in layer.why_not_triton)
        lines += [f"triton does not run: {reason}" for reason in reasons]
        unfused = dict.fromkeys(layer.why_not_fused for layer in self.layers if layer.why_not_fused)
        lines += [f"audio_kv is not fused: {reason}" for reason in unfused]
        return "\n".join(lines)


def attach(
    model: PreTrainedModel,
    config: "LalConfig | str | os.PathLike[str] | None" = None,
    *,
    connector: nn.Module | None = None,
    projectors: Mapping[int, nn.Module] | None = None,
) -> "LalHandle":
    """Let a causal LM take ``audio=AudioState(...)`` in ``forward`` and ``generate``.

    The model is changed in place and works as before without audio. Attaching again with the same config returns the
    same handle. A peft model is attached by its base model; adapters may be added before or after.

    Each layer is run once to see whether it computes what is known here; where its weights have no values yet (on the
    meta device), the first forward with audio does that. Under ``torch.compile`` values are not looked at: a forward's
    ``position_ids`` and holes in its mask are ignored there.

    Args:
        config: the settings, or a directory that :meth:`LalHandle.save` wrote.
        connector: kept as ``handle.connector``: what turns an encoder's states (A, N, input size) into the model's
            (A, N, d). From a directory, those in :mod:`palkernels.model.connectors` and Linear are built; another class
            must be given here, and takes the saved weights.
        projectors: kept as ``handle.projectors``: by layer, what turns the connector's output into that layer's states;
            one for every layer that takes audio, or None where all share the connector's output.

    Raises:
        TypeError, ValueError: the model or the config is not supported; the message names the model and the reason.
    """
    config = LalConfig() if config is None else config
    model = base_model(model)
    saved = None
    if isinstance(config, str | os.PathLike):
        saved = load(model, config, connector, projectors)
        config, connector, projectors = LalConfig(**saved.config), saved.connector, saved.projectors
    if not isinstance(config, LalConfig):
        raise TypeError(f"config must be a LalConfig or a directory, got {type(config).__name__}")
    attached = getattr(model, HANDLE, None)
    if attached is not None:
        if attached.config != config:
            raise ValueError(f"the model must be detached before another config is attached, got {config}")
        if named_modules(connector, projectors):
            raise ValueError("the model must be detached before a connector or projectors are attached")
        return attached  # type: ignore[no-any-return]
    handle = LalHandle(model, config, connector, projectors)
    if saved is not None:
        saved.fill()  # only now that nothing is refused any more: modules that were given take the saved weights
    return handle


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model itself, also of a peft model."""
    if not isinstance(model, PreTrainedModel) and callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    return model


class Attached:
    """A model whose ``forward`` and ``generate`` take audio, by patches of its methods.

    The patches and :class:`~palkernels.model.causal_lm.generation.Generation` ask a handle for ``rotary``,
    ``forward``, ``plan``, ``positions``, ``rotations``, ``request`` and ``project_at_once``.
    """

    model: PreTrainedModel
    selected: tuple[int, ...]  # the layers that take audio

    def patch(self) -> None:
        """The last step of attaching."""
        model = self.model
        # An instance may carry its own forward already (accelerate's hooks): it is called, and put back.
        self._stock = {patch.name: model.__dict__.get(patch.name) for patch in PATCHES}
        object.__setattr__(model, HANDLE, self)
        for patch in PATCHES:
            object.__setattr__(model, patch.name, patch(self))

    def unpatch(self) -> None:
        """The last step of detaching."""
        model = self.model
        for name, stock in self._stock.items():
            patch = model.__dict__.get(name)
            if not isinstance(patch, _Patched) or patch.handle is not self:
                continue  # somebody has wrapped ours, which only passes on what it is given from now on
            if stock is None:
                object.__delattr__(model, name)
            else:
                object.__setattr__(model, name, stock)
        object.__delattr__(model, HANDLE)

    def stock(self, name: str) -> Callable[..., Any]:
        """The model's forward or generate as it was before."""
        own = self._stock[name]
        return own if own is not None else functools.partial(getattr(type(self.model), name), self.model)

    def run(self, request: Request, arguments: dict[str, Any]) -> Any:
        """The stock forward, its layers given the request; every selected one must have taken the audio."""
        request.consumed, request.ran = set(), True
        outputs = self.stock("forward")(**arguments, **{REQUEST_KEYWORD: request})
        if request.consumed != set(self.selected):
            missed = sorted(set(self.selected) - request.consumed)
            raise RuntimeError(f"every selected layer must take the audio, but layers {missed} did not")
        return outputs


class LalHandle(Attached):
    """An attached model. ``detach()`` makes it a stock model again, ``report()`` says what runs, ``save()`` keeps the
    settings, the connector and the projectors."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LalConfig,
        connector: nn.Module | None = None,
        projectors: Mapping[int, nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        decoder = find_decoder(model)
        self.layers: list[nn.Module] = list(decoder.layers)
        self.rotary: Rotary = find_rotary(model, decoder)
        everything = tuple(range(len(self.layers)))
        self.selected: tuple[int, ...] = everything if config.layers == "all" else tuple(config.layers)  # type: ignore[arg-type]
        if not set(self.selected) <= set(everything):
            raise ValueError(f"layers must be from 0 to {len(everything) - 1}, got {self.selected}")
        self.connector = connector
        self.projectors = None if projectors is None else dict(projectors)
        if self.projectors is not None and set(self.projectors) != set(self.selected):
            raise ValueError(
                f"projectors must be given for layers {list(self.selected)}, got {sorted(self.projectors)}"
            )
        check_order(model, self.layers)
        self._checked = {i: check_layer(model, self.layers[i], i, self.rotary) for i in self.selected}

        self._stock_configs: dict[int, Any] = {}
        for index in self.selected:
            attention: Any = self.layers[index].self_attn
            self._stock_configs[index] = attention.config
            ours = copy.copy(attention.config)
            setattr(ours, STOCK_CONFIG, attention.config)
            ours._attn_implementation = ATTENTION_NAME
            attention.config = ours
        self.patch()

    def detach(self) -> None:
        """Make the model a stock one again; a second call does nothing."""
        if getattr(self.model, HANDLE, None) is not self:
            return
        for index, stock in self._stock_configs.items():
            attention: Any = self.layers[index].self_attn
            attention.config = stock
        self.unpatch()

    def state(
        self,
        encoded: Tensor | tuple[Tensor, ...],
        lengths: Tensor | None = None,
        index: Tensor | None = None,
        insert_at: Tensor | None = None,
    ) -> AudioState:
        """The :class:`AudioState` of an encoder's states (A, N, input size): through the connector, if there is one,
        and each layer's projector, if there are any. ``lengths`` are those of the encoder's states; a connector of ours
        turns them into its own, and takes a tuple where it joins several encoders. The rest is AudioState's."""
        from palkernels.model.connectors.base import Connector  # attach alone needs no connector

        states: Any = encoded
        if isinstance(self.connector, Connector):
            states, lengths = self.connector.connect(encoded, lengths)
        elif self.connector is not None:
            states = self.connector(encoded)
        if self.projectors is not None:
            found = (self.projectors.get(layer) for layer in range(len(self.layers)))
            states = [None if projector is None else projector(states) for projector in found]
        return AudioState(states, lengths, index, insert_at)

    def save(self, directory: "str | os.PathLike[str]") -> Path:
        """Write settings, connector and projectors to ``directory/lal.safetensors``, for ``attach(model, directory)``.
        The language model is not in it: ``model.save_pretrained`` saves that, as a stock model."""
        return save(self, directory)

    def report(self) -> LalReport:
        """Per layer: whether it sees audio, what attends and why not Triton, what projects and why not audio_kv."""
        why_not_fused = self.why_not_fused()
        layers = tuple(self._report_layer(index, why_not_fused) for index in range(len(self.layers)))
        return LalReport(type(self.model).__name__, self.config.rope, layers)

    def _report_layer(self, index: int, why_not_fused: str | None) -> LayerReport:
        if index not in self.selected:
            return LayerReport(index, False, "stock", (), None)
        attention: Any = self.layers[index].self_attn
        device = next(devices_of(attention))
        heads = attention.config.num_attention_heads
        query = torch.empty(1, heads, 1, attention.head_dim, dtype=self.model.dtype, device=device)
        key = query[:, : num_kv_heads(attention)]
        reasons = unsupported_reasons(query, key, key, key, key, impl="triton")
        impl = self.config.impl
        if impl == "auto":
            impl = "triton" if query.is_cuda and not reasons else "sdpa"
        elif impl == "triton" and reasons:
            impl = "none"
        return LayerReport(index, True, impl, tuple(reasons), why_not_fused)

    def why_not_fused(self) -> str | None:
        """Why audio goes through each layer's modules; None: audio_kv takes it."""
        for index in self.selected:
            reason = self._why_layer_not_fused(index)
            if reason is not None:
                return f"layer {index}: {reason}"
        layers = [self.layers[index] for index in self.selected]
        if not alike(layers) or len({self._offset(index) for index in self.selected}) > 1:
            return "the layers are not of one shape"
        return None

    def _why_layer_not_fused(self, index: int) -> str | None:
        layer, checked = self.layers[index], self._checked[index]
        reason = why_not_plain(layer)
        if reason is not None:
            return reason
        if checked is None:
            return "its weights had no values at attach, the first forward with audio compares them"
        if checked.norms != norms_of(layer):
            return "its norms are others than at attach"
        if checked.offset is None:
            return "audio_kv does not know its norm, its projections or its RoPE"
        return None

    def _offset(self, index: int) -> float | None:
        checked = self._checked[index]
        return None if checked is None else checked.offset

    def norm_offset(self, state: AudioState) -> float | None:
        """That of the layers' norms where audio_kv may take their weights now, else None."""
        if (
            not self.selected
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(state.device.type)
            or self.why_not_fused() is not None
        ):
            return None
        return self._offset(self.selected[0])

    def project_at_once(self, request: Request) -> dict[int, AudioKV]:
        """Every layer's K and V before the first layer runs, if that is possible and pays: without gradients, in which
        each layer's are made where they are used. One call where layers share their states."""
        if request.norm_offset is None or torch.is_grad_enabled():
            return {}
        if isinstance(request.state.states, Tensor):
            return request.project_fused(self.selected)
        return {index: request.project_fused([index])[index] for index in self.selected}

    def forward(self, audio: AudioState, arguments: dict[str, Any]) -> Any:
        """One forward with audio; ``arguments`` by name."""
        inputs = texts_of(arguments)
        batch, num_queries = inputs.shape[:2]
        past = keys_in(arguments.get("past_key_values"), inputs.device)
        plan = self.plan(audio, 1, arguments, batch, past, num_queries, inputs.device)
        arguments["position_ids"] = self.positions(plan, past, num_queries)
        rotations = self.rotations(audio, plan, past, num_queries)
        request = self.request(audio, plan, rotations, past + num_queries, None)
        request.cached = self.project_at_once(request) or None
        return self.run(request, arguments)

    def run(self, request: Request, arguments: dict[str, Any]) -> Any:
        """See :meth:`Attached.run`."""
        if None in self._checked.values():
            self._check_again()
        if arguments.get("attention_mask") is None and arguments.get("past_key_values") is None:
            # Without a mask, transformers reads a jump in position_ids as the start of another packed sequence.
            arguments["attention_mask"] = torch.ones_like(arguments["position_ids"])
        return super().run(request, arguments)

    def _check_again(self) -> None:
        """What attach could not compare, now that there may be values."""
        if torch.compiler.is_compiling():
            raise RuntimeError("a model that was attached without values must run with audio before it is compiled")
        for index, checked in self._checked.items():
            if checked is None:
                self._checked[index] = check_layer(self.model, self.layers[index], index, self.rotary)

    def request(
        self,
        state: AudioState,
        plan: Plan,
        rotations: tuple[Rotation | None, ...],
        num_keys: int | Tensor,
        cached: dict[int, AudioKV] | None,
    ) -> Request:
        impl, recompute = self.config.impl, self.config.recompute_audio_kv
        offset = None if cached else self.norm_offset(state)  # what is kept needs no projection
        return Request(state, plan, self.layers, rotations, num_keys, impl, recompute, offset, cached)

    def positions(self, plan: Plan, past: int | Tensor, num_queries: int) -> Tensor:
        """RoPE positions of the text (B, T)."""
        return plan.positions(past, num_queries, shifted=self.config.rope == "sequence")

    def rotations(
        self, state: AudioState, plan: Plan, past: int | Tensor, num_queries: int
    ) -> tuple[Rotation | None, ...]:
        """Per layer, cos and sin of the audio's positions, None where its keys are not rotated."""
        if self.config.rope == "none" or not self.selected:
            return (None,) * len(self.layers)
        longest = self.positions(plan, past, num_queries).max()
        if self.rotary.depends_on_length and not torch.compiler.is_compiling() and plan.begun:
            reach = int((plan.length + plan.layout.text_lengths).max()) - 1
            if int(longest) < reach:
                raise ValueError(
                    "audio must stand before the last token of the longest text, since the model's RoPE depends on the "
                    f"longest position, got audio up to position {reach} and text up to {int(longest)}"
                )
        like = state.for_layer(self.selected[0])
        assert like is not None  # the state was checked
        found = self.rotary.of_layers(self.selected, like, plan.layout.positions, longest)
        return tuple(found.get(kind) for kind in self.rotary.layer_types)

    def _check(self, state: AudioState, arguments: dict[str, Any]) -> None:
        check_state(state, self.model, len(self.layers), self.selected)
        if arguments.get("output_attentions") or getattr(self.model.config, "output_attentions", False):
            raise ValueError("output_attentions must be off with audio: the kernels do not form attention weights")
        if self.model.training:
            check_reentrant(self.model, [self.layers[index] for index in self.selected])
            for index in self.selected:
                if getattr(self.layers[index].self_attn, "attention_dropout", 0.0):
                    raise ValueError("attention_dropout must be 0 in training with audio: the kernels do not drop out")

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
        self._check(state, arguments)
        rotated = self.config.rope == "sequence"
        return make_plan(
            state, copies, arguments, batch, past, num_queries, device, rotated=rotated, training=self.model.training
        )


class _Patched:
    """What an attached instance has in place of a method, and whoever wrapped it keeps after ``detach``. An object, not
    a bound method: pickling a bound method keeps its name alone, which a loaded model would look up in its class."""

    name: str
    takes_audio = True

    def __init__(self, handle: Any) -> None:  # an Attached with what generation asks of it
        self.handle = handle
        parameters = inspect.signature(getattr(type(handle.model), self.name)).parameters.values()
        self.positional = [x.name for x in parameters if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's own signature and ``audio``: transformers reads it."""
        signature = inspect.signature(getattr(type(self.handle.model), self.name))
        return _with_audio(signature) if self.takes_audio and self.attached else signature

    @property
    def attached(self) -> bool:
        return getattr(self.handle.model, HANDLE, None) is self.handle

    def stock(self, args: tuple[Any, ...], kwargs: dict[str, Any], audio: object = None) -> Any:
        """The call without audio."""
        if audio is not None:
            raise ValueError(f"the model must be attached where {self.name} is given audio, got it after detach")
        return self.handle.stock(self.name)(*args, **kwargs)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name; raises as Python does where they do not fit."""
        names = self.positional
        twice = [name for name in names[: len(args)] if name in kwargs]
        if len(args) > len(names) or twice:
            got = f"{twice[0]} twice" if twice else f"{len(args)}"
            raise TypeError(f"{self.name} must be given at most {len(names)} positional arguments, got {got}")
        return {**dict(zip(names, args, strict=False)), **kwargs}


class AudioForward(_Patched):
    """``forward`` of an attached model."""

    name = "forward"

    def __call__(self, *args: Any, audio: "AudioState | Request | None" = None, **kwargs: Any) -> Any:
        if args and args[0] is self.handle.model:
            args = args[1:]  # accelerate's unwrap_model binds whatever was its forward to the model
        if audio is None or not self.attached:
            return self.stock(args, kwargs, audio)
        arguments = self.by_name(args, kwargs)
        if isinstance(audio, Request):
            check_unchanged(audio, arguments)
            return self.handle.run(audio, arguments)
        return self.handle.forward(audio, arguments)


class AudioGenerate(_Patched):
    """``generate`` of an attached model."""

    name = "generate"

    def __call__(self, *args: Any, audio: AudioState | None = None, **kwargs: Any) -> Any:
        if not self.attached:
            return self.stock(args, kwargs, audio)
        return generate(self.handle, audio, self.by_name(args, kwargs))


class AudioPrepare(_Patched):
    """``prepare_inputs_for_generation`` of an attached model, which transformers calls before every forward."""

    name = "prepare_inputs_for_generation"
    takes_audio = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.stock(args, kwargs)
        generation = current(self.handle.model)
        if generation is not None and generation.handle is self.handle:
            generation.prepare(arguments, kwargs.get("attention_mask"))
        return arguments


PATCHES = (AudioForward, AudioGenerate, AudioPrepare)


def _with_audio(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    audio = inspect.Parameter("audio", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=AudioState | None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:at], audio, *parameters[at:]])
