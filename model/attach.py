"""Drop-in: :func:`attach` lets a stock Hugging Face causal LM take audio as extra keys and values (LAL).

The model's modules and weights stay as they are. Each selected layer's attention gets a copy of its config that names
our attention function; ``forward`` and ``generate`` of this one instance learn the keyword ``audio=``. Without audio
the stock functions run.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels import unsupported_reasons
from palkernels.checks import IMPLEMENTATIONS
from palkernels.model.attention import (
    ATTENTION_NAME,
    REQUEST_KEYWORD,
    STOCK_CONFIG,
    AudioKV,
    Request,
)
from palkernels.model.audio_state import AudioState
from palkernels.model.plan import AudioLayout, Plan, check_places, padding
from palkernels.model.support import check_layer, check_rope, find_decoder

HANDLE = "_palkernels_handle"


@dataclass(frozen=True)
class LalConfig:
    """How audio enters the model.

    Args:
        layers: "all", or the indices of the layers that see audio; delayed LAL is ``range(4, num_layers)``.
        rope: "sequence" gives audio keys the positions they would have if the audio stood in the text, and shifts
            the text behind it; "none" leaves audio keys as projected and text positions as they are. The paper does
            not say which it uses; the default follows its closest public relatives.
        impl: the implementation of :func:`palkernels.lal_attention`.
    """

    layers: str | Iterable[int] = "all"
    rope: str = "sequence"
    impl: str = "auto"

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


@dataclass(frozen=True)
class LayerReport:
    """What one layer runs when the model is given audio."""

    layer: int
    audio: bool  # whether the layer sees audio
    impl: str  # the implementation; "stock" where the layer sees no audio, "none" where it would raise
    why_not_triton: tuple[str, ...]  # empty where triton runs


@dataclass(frozen=True)
class LalReport:
    """What :meth:`LalHandle.report` returns; ``str`` of it is a table."""

    model: str
    rope: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}, rope={self.rope!r}", "layer  audio  implementation"]
        lines += [f"{x.layer:5}  {'yes' if x.audio else 'no':5}  {x.impl}" for x in self.layers]
        reasons = dict.fromkeys(reason for layer in self.layers for reason in layer.why_not_triton)
        lines += [f"triton does not run: {reason}" for reason in reasons]
        return "\n".join(lines)


def attach(model: PreTrainedModel, config: LalConfig | None = None) -> "LalHandle":
    """Let a causal LM take ``audio=AudioState(...)`` in ``forward`` and ``generate``.

    The model is changed in place and works as before without audio. Attaching again with the same config returns the
    same handle.

    Raises:
        TypeError, ValueError: the model or the config is not supported; the message names the model and the reason.
    """
    config = LalConfig() if config is None else config
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if not isinstance(config, LalConfig):
        raise TypeError(f"config must be a LalConfig, got {type(config).__name__}")
    attached = getattr(model, HANDLE, None)
    if attached is not None:
        if attached.config != config:
            raise ValueError(f"the model must be detached before another config is attached, got {config}")
        return attached  # type: ignore[no-any-return]
    return LalHandle(model, config)


class LalHandle:
    """An attached model. ``detach()`` makes it a stock model again, ``report()`` says what runs."""

    def __init__(self, model: PreTrainedModel, config: LalConfig) -> None:
        self.model = model
        self.config = config
        decoder = find_decoder(model)
        self.layers: list[nn.Module] = list(decoder.layers)
        self.rotary: nn.Module = decoder.rotary_emb
        everything = tuple(range(len(self.layers)))
        self.selected: tuple[int, ...] = everything if config.layers == "all" else tuple(config.layers)  # type: ignore[arg-type]
        if not set(self.selected) <= set(everything):
            raise ValueError(f"layers must be from 0 to {len(everything) - 1}, got {self.selected}")
        check_rope(model, decoder.config, config.rope)
        for index in self.selected:
            check_layer(model, self.layers[index], index, self.rotary)

        self._stock_configs: dict[int, Any] = {}
        for index in self.selected:
            attention: Any = self.layers[index].self_attn
            self._stock_configs[index] = attention.config
            ours = copy.copy(attention.config)
            setattr(ours, STOCK_CONFIG, attention.config)
            ours._attn_implementation = ATTENTION_NAME
            attention.config = ours
        # An instance may carry its own forward already (accelerate's hooks): it is called, and put back.
        self._stock = {name: model.__dict__.get(name) for name in ("forward", "generate")}
        object.__setattr__(model, HANDLE, self)
        object.__setattr__(model, "forward", AudioForward(model))
        object.__setattr__(model, "generate", AudioGenerate(model))

    def detach(self) -> None:
        """Make the model a stock one again; a second call does nothing."""
        model = self.model
        if getattr(model, HANDLE, None) is not self:
            return
        for index, stock in self._stock_configs.items():
            attention: Any = self.layers[index].self_attn
            attention.config = stock
        for name, stock in self._stock.items():
            if stock is None:
                object.__delattr__(model, name)
            else:
                object.__setattr__(model, name, stock)
        object.__delattr__(model, HANDLE)

    def report(self) -> LalReport:
        """Per layer: whether it sees audio, which implementation runs, and why Triton does not."""
        return LalReport(
            type(self.model).__name__,
            self.config.rope,
            tuple(self._report_layer(index) for index in range(len(self.layers))),
        )

    def _report_layer(self, index: int) -> LayerReport:
        if index not in self.selected:
            return LayerReport(index, False, "stock", ())
        attention: Any = self.layers[index].self_attn
        weight = attention.k_proj.weight
        heads = attention.config.num_attention_heads
        query = torch.empty(1, heads, 1, attention.head_dim, dtype=weight.dtype, device=weight.device)
        key = query[:, : heads // attention.num_key_value_groups]
        reasons = unsupported_reasons(query, key, key, key, key, impl="triton")
        impl = self.config.impl
        if impl == "auto":
            impl = "triton" if query.is_cuda and not reasons else "sdpa"
        elif impl == "triton" and reasons:
            impl = "none"
        return LayerReport(index, True, impl, tuple(reasons))

    def stock(self, name: str) -> Callable[..., Any]:
        """The model's forward or generate as it was before."""
        own = self._stock[name]
        return own if own is not None else functools.partial(getattr(type(self.model), name), self.model)

    def forward(self, audio: "AudioState | Generation", arguments: dict[str, Any]) -> Any:
        """One forward with audio; ``arguments`` by name."""
        generation = audio if isinstance(audio, Generation) else None
        state = audio.state if isinstance(audio, Generation) else audio
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise ValueError("a forward with audio must be given input_ids or inputs_embeds, got neither")
        if inputs.ndim < 2 or inputs.shape[1] == 0:
            raise ValueError(
                f"a forward with audio must be given texts (B, T), T >= 1, got shape {tuple(inputs.shape)}"
            )
        batch, num_queries = inputs.shape[:2]
        self._check(state, arguments)
        copies = 1 if generation is None else generation.copies(batch)
        if batch != copies * state.batch_size:
            raise ValueError(f"audio must describe the batch's {batch} text rows, got {state.batch_size}")

        cache = arguments.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if generation is not None and generation.plan is not None and generation.plan.begun:
            plan = generation.plan
        else:
            plan = self._plan(state, copies, arguments, batch, past, num_queries, inputs.device)
            if generation is not None:
                if plan.right_padded:
                    raise ValueError("generate must be given a prompt without right padding: pad on the left")
                generation.plan = plan
        if arguments.get("attention_mask") is None:
            # Without a mask, transformers reads a jump in position_ids as the start of another packed sequence.
            arguments["attention_mask"] = torch.ones(batch, past + num_queries, dtype=torch.long, device=inputs.device)
        arguments["position_ids"] = self._positions(plan, past, num_queries)

        request = Request(
            state,
            plan.layout,
            self.layers,
            plan.rotation,
            plan.text_start,
            past + num_queries,
            self.config.impl,
            None if generation is None else generation.cached,
        )
        outputs = self.stock("forward")(**arguments, **{REQUEST_KEYWORD: request})
        if request.consumed != set(self.selected):
            missed = sorted(set(self.selected) - request.consumed)
            raise RuntimeError(f"every selected layer must take the audio, but layers {missed} did not")
        return outputs

    def _check(self, state: AudioState, arguments: dict[str, Any]) -> None:
        if not isinstance(state, AudioState):
            raise TypeError(f"audio must be an AudioState, got {type(state).__name__}")
        embedding: Any = self.model.get_input_embeddings()
        width, dtype, device = embedding.weight.shape[1], embedding.weight.dtype, embedding.weight.device
        if state.hidden_size != width:
            raise ValueError(f"audio states must have the model's hidden size {width}, got {state.hidden_size}")
        if state.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"audio states must have the model's dtype {dtype}, got {state.dtype}")
        if state.device != device:
            raise ValueError(f"audio states must be on the model's device {device}, got {state.device}")
        if not isinstance(state.states, Tensor):
            given = [index for index, states in enumerate(state.states) if states is not None]
            if len(state.states) != len(self.layers) or given != list(self.selected):
                raise ValueError(
                    f"a list of states must have an entry for each of {len(self.layers)} layers, a tensor exactly at "
                    f"layers {list(self.selected)}, got {len(state.states)} entries with tensors at {given}"
                )
        if arguments.get("output_attentions") or getattr(self.model.config, "output_attentions", False):
            raise ValueError("output_attentions must be off with audio: the kernels do not form attention weights")
        if self.model.training:
            for index in self.selected:
                if getattr(self.layers[index].self_attn, "attention_dropout", 0.0):
                    raise ValueError("attention_dropout must be 0 in training with audio: the kernels do not drop out")

    def _plan(
        self,
        state: AudioState,
        copies: int,
        arguments: dict[str, Any],
        batch: int,
        past: int,
        num_queries: int,
        device: torch.device,
    ) -> Plan:
        mask = arguments.get("attention_mask")
        start = torch.zeros(batch, dtype=torch.long, device=device)
        length = torch.full_like(start, past + num_queries)
        left_padded = right_padded = False
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != (batch, past + num_queries):
                got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"attention_mask must be 2-D with audio, (B, past + T) = {(batch, past + num_queries)}, got {got}"
                )
            start, length, left_padded, right_padded = padding(mask)
        no_text_follows = self.model.training or arguments.get("use_cache") is False
        if no_text_follows and copies == 1:  # generate has checked its prompt
            check_places(state, length)

        rotated = self.config.rope == "sequence"
        layout = AudioLayout.of(state, copies, rotated=rotated)
        rotation = None
        if rotated and self.selected:
            like = state.for_layer(self.selected[0])
            rotation = self.rotary(like, layout.positions)
        begun = mask is None or (not torch.compiler.is_compiling() and bool((length > 0).all()))
        plan = Plan(layout, rotation, start, start if left_padded else None, right_padded, begun)

        given = arguments.get("position_ids")
        if given is not None and not torch.compiler.is_compiling():
            own = plan.text_index(past, num_queries)
            counted = (own >= 0) & (own < length.unsqueeze(1))
            fits = isinstance(given, Tensor) and given.ndim == 2 and given.shape[1] == num_queries
            if not fits or given.shape[0] not in (1, batch) or bool(((given != own) & counted).any()):
                what = given.tolist() if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(
                    "position_ids must count each row's own text from 0 with audio, (B, T) (packed sequences are not "
                    f"supported), got {what}"
                )
        return plan

    def _positions(self, plan: Plan, past: int, num_queries: int) -> Tensor:
        """RoPE positions of the text (B, T)."""
        own = plan.text_index(past, num_queries).clamp(min=0)
        return own + plan.layout.shift(own) if self.config.rope == "sequence" else own


class Generation:
    """One generate call: the caller's state, and what is worked out once and kept until the call ends."""

    def __init__(self, state: AudioState) -> None:
        self.state = state
        self.plan: Plan | None = None
        self.cached: dict[int, AudioKV] = {}

    def copies(self, batch: int) -> int:
        """Text rows per row of the prompt: beams and returned sequences follow each other."""
        if not self.state.batch_size or batch % self.state.batch_size:
            raise ValueError(
                f"audio must describe the prompt's rows, got {self.state.batch_size} for {batch} text rows"
            )
        return batch // self.state.batch_size


class _Patched:
    """What an attached instance has in place of a method. An object, not a bound method: pickling a bound method keeps
    its name alone, which a loaded model would look up in its class."""

    name: str

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's own signature and ``audio``: transformers reads it."""
        return _with_audio(inspect.signature(getattr(type(self.model), self.name)))

    @property
    def handle(self) -> LalHandle:
        handle: LalHandle = getattr(self.model, HANDLE)
        return handle

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name; raises as Python does where they do not fit."""
        parameters = inspect.signature(getattr(type(self.model), self.name)).parameters.values()
        names = [x.name for x in parameters if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]
        twice = [name for name in names[: len(args)] if name in kwargs]
        if len(args) > len(names) or twice:
            got = f"{twice[0]} twice" if twice else f"{len(args)}"
            raise TypeError(f"{self.name} must be given at most {len(names)} positional arguments, got {got}")
        return {**dict(zip(names, args, strict=False)), **kwargs}


class AudioForward(_Patched):
    """``forward`` of an attached model."""

    name = "forward"

    def __call__(self, *args: Any, audio: "AudioState | Generation | None" = None, **kwargs: Any) -> Any:
        if audio is None:
            return self.handle.stock("forward")(*args, **kwargs)
        return self.handle.forward(audio, self.by_name(args, kwargs))


class AudioGenerate(_Patched):
    """``generate`` of an attached model."""

    name = "generate"

    def __call__(self, *args: Any, audio: AudioState | None = None, **kwargs: Any) -> Any:
        if audio is None:
            return self.handle.stock("generate")(*args, **kwargs)
        if not isinstance(audio, AudioState):
            raise TypeError(f"audio must be an AudioState, got {type(audio).__name__}")
        arguments = self.by_name(args, kwargs)
        if arguments.get("assistant_model") is not None:
            raise ValueError("assistant_model must be None with audio: assisted decoding is not supported yet")
        prompts = (arguments.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        prompt = next((prompt for prompt in prompts if prompt is not None), None)
        if not isinstance(prompt, Tensor) or prompt.ndim < 2:
            raise ValueError("generate must be given a prompt with audio: input_ids or inputs_embeds of (B, T, ...)")
        rows, length = prompt.shape[:2]
        if rows != audio.batch_size:
            raise ValueError(f"audio must describe the prompt's {rows} rows, got {audio.batch_size}")
        mask = arguments.get("attention_mask")
        lengths = torch.full((rows,), length, device=audio.device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            lengths = (mask != 0).sum(dim=1)
        if bool((lengths == 0).any()):
            raise ValueError("every row of a prompt with audio must hold a token, got a row of padding")
        check_places(audio, lengths)
        return self.handle.stock("generate")(**arguments, audio=Generation(audio))


def _with_audio(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    audio = inspect.Parameter("audio", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=AudioState | None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:at], audio, *parameters[at:]])
