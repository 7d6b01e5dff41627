"""Which models can be attached, found out by looking at their layers and by running them; which audio fits them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules.dropout import _DropoutNd
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from palkernels.errors import one_line
from palkernels.model.causal_lm.caches import CACHE_KEYWORDS, cache_keyword
from palkernels.model.causal_lm.fast_path import (
    LayerCheck,
    describe_norms,
    find_norm_offset,
    relative_error,
    why_not_plain,
)
from palkernels.model.causal_lm.layers import AudioKV, Rotary, project_audio, rotate
from palkernels.model.causal_lm.request import REQUEST_KEYWORD
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.steps import why_not_stepped

PROBE_NAME = "palkernels_probe"
# What an attention function may be given besides tensors and mask: ours honours these, or they change nothing.
KNOWN_KEYWORDS = frozenset(
    {"key", "value", "attention_mask", "scaling", "dropout", "sliding_window", "softcap", "position_ids"}
    | {"position_embeddings", "use_cache", "cache_position", *CACHE_KEYWORDS}
)
CHECK_TOKENS, CHECK_CACHED = 4, 3  # that a layer is run on, behind those in its cache
CHECK_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-8}


def base_model(model: Any) -> PreTrainedModel:
    """Return the transformers model itself, also of a peft model.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(model, PreTrainedModel) and callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    return model


def refusal(model: PreTrainedModel, reason: str) -> ValueError:
    """Make the error for a model that cannot be attached."""
    return ValueError(f"attach must be given a causal LM like Llama or Qwen2, got {type(model).__name__}: {reason}")


def find_decoder(model: PreTrainedModel) -> Any:
    """Return the stack of decoder layers of a causal LM.

    Raises:
        ValueError: its layers cannot be made to take audio.
    """
    if not model.can_generate():
        raise refusal(model, "it is not a causal LM")
    if model.config.get_text_config() is not model.config:
        raise refusal(model, "it is composed of several models, give its language model")
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    missing = [part for part in ("layers", "rotary_emb") if not hasattr(decoder, part)]
    if missing:
        raise refusal(model, f"its decoder has no {' and no '.join(missing)}")
    if not getattr(model, "_supports_attention_backend", False):
        raise refusal(model, "its attention function cannot be chosen")
    reason = why_not_stepped(model)
    if reason is not None:
        raise refusal(model, f"{reason} (transformers {transformers.__version__})")
    return decoder


def find_rotary(model: PreTrainedModel, decoder: Any) -> Rotary:
    """Return the decoder's rotary embedding.

    Raises:
        ValueError: its positions are not single numbers.
    """
    rotary = Rotary(decoder.rotary_emb, decoder.config, len(decoder.layers))
    if rotary.several_dimensions:
        raise refusal(model, "its positions have several dimensions")
    return rotary


def devices_of(module: nn.Module, brought_to: Any = None) -> Iterator[torch.device]:
    """Yield the device of each of a module's tensors, or that to which accelerate's hooks bring it for a call.

    ``brought_to`` is where hooks of the modules around this one bring it.
    """
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        brought_to = brought_to if device is None else device
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        yield torch.device(brought_to) if tensor.is_meta and brought_to is not None else tensor.device
    for child in module.children():
        yield from devices_of(child, brought_to)


def check_state(state: AudioState, model: PreTrainedModel, num_layers: int, selected: Sequence[int]) -> None:
    """Check that the audio fits the model and, where it is given per layer, is there for the selected layers alone.

    Raises:
        TypeError, ValueError: it does not.
    """
    if not isinstance(state, AudioState):
        raise TypeError(f"audio must be an AudioState, got {type(state).__name__}")
    embedding: Any = model.get_input_embeddings()
    width, dtype, device = embedding.weight.shape[1], embedding.weight.dtype, next(devices_of(embedding))
    if state.hidden_size != width:
        raise ValueError(f"audio states must have the model's hidden size {width}, got {state.hidden_size}")
    if state.dtype != dtype and not torch.is_autocast_enabled(device.type):
        raise TypeError(f"audio states must have the model's dtype {dtype}, got {state.dtype}")
    if state.device != device:
        raise ValueError(f"audio states must be on the model's device {device}, got {state.device}")
    if not isinstance(state.states, Tensor):
        present = [index for index, states in enumerate(state.states) if states is not None]
        if len(state.states) != num_layers or present != list(selected):
            raise ValueError(
                f"a list of states must have an entry for each of {num_layers} layers, a tensor exactly at "
                f"layers {list(selected)}, got {len(state.states)} entries with tensors at {present}"
            )


def check_reentrant(layers: Sequence[nn.Module]) -> None:
    """Refuse reentrant checkpointing of layers that take audio.

    It would drop the gradients of the audio, which is no positional argument of a layer.
    """
    for layer in layers:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(layer, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing must be non-reentrant with audio: "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )


class _Cache(DynamicCache):  # type: ignore[misc]
    """A cache that holds keys already, and notes what a layer adds to it and gets from it."""

    def __init__(self) -> None:
        super().__init__()
        self.added: list[AudioKV] = []
        self.returned: list[AudioKV] = []

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> AudioKV:
        if not self.added:
            super().update(key[:, :, :CHECK_CACHED], value[:, :, :CHECK_CACHED], *args, **kwargs)
        self.added.append((key, value))
        self.returned.append(super().update(key, value, *args, **kwargs))
        return self.returned[-1]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return super().get_seq_length(*args, **kwargs) if self.added else CHECK_CACHED


class _Recorder:
    """Stands in for a request: notes how a layer calls its attention."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Note how a layer calls its attention function, and attend to nothing."""
    recorder = kwargs.pop(REQUEST_KEYWORD, None)
    if recorder is None:
        raise TypeError("keywords do not reach its attention function")
    recorder.calls.append({"key": key, "value": value, "attention_mask": attention_mask, **kwargs})
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


AttentionInterface.register(PROBE_NAME, _probe_attention)


def check_order(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Refuse layers that stand elsewhere than their attention's number says.

    The number is how a layer finds its audio, which would be projected with another layer's weights.
    """
    for index, layer in enumerate(layers):
        number = getattr(getattr(layer, "self_attn", None), "layer_idx", index)
        if number != index:
            raise refusal(model, f"layer {index} has the attention of layer {number}")


@contextmanager
def _unsharded(layer: Any) -> Iterator[None]:
    """Gather a layer's weights. FSDP2 does so when the layer is called, but not when its ``forward`` is."""
    sharded = hasattr(layer, "unshard")
    if sharded:
        layer.unshard()
    try:
        yield
    finally:
        if sharded:
            layer.reshard()


@contextmanager
def _without_dropout(layer: nn.Module) -> Iterator[None]:
    """Let a layer drop nothing out, as adapters do in training: two runs would differ, and draw random numbers.

    All else stays in its mode: bitsandbytes packs 4-bit weights anew where it first finds them in evaluation.
    """
    training = [module for module in layer.modules() if module.training and isinstance(module, _DropoutNd)]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_layer(model: PreTrainedModel, layer: nn.Module, index: int, rotary: Rotary) -> LayerCheck | None:
    """Run a layer once on random states, and compare its K and V with those that we compute for audio.

    Returns:
        What audio_kv must know of the layer; None where its weights have no values yet, or zeros, so that there is
        nothing to compare.

    Raises:
        ValueError: K and V differ, or the layer's attention is more than scaled, capped, causal and windowed.
    """
    attention: Any = getattr(layer, "self_attn", None)
    projections = () if hasattr(attention, "qkv_proj") else ("k_proj", "v_proj")
    missing = [part for part in (*projections, "config", "head_dim", "layer_idx") if not hasattr(attention, part)]
    missing += [] if hasattr(layer, "input_layernorm") else ["input_layernorm"]
    if missing:
        raise refusal(model, f"a layer has no {', no '.join(missing)}")
    if getattr(attention.config, "clip_qkv", None) is not None:  # random states may lie within
        raise refusal(model, "it clips its keys and values (clip_qkv)")
    embedding: Any = model.get_input_embeddings()
    weight = embedding.weight
    if is_fake(weight):  # it never gets values, so no offset is wrong
        return LayerCheck(0.0 if why_not_plain(layer) is None else None, describe_norms(layer))
    device = next(devices_of(embedding))
    if any(x.type == "meta" for x in (device, *devices_of(layer))):
        return None
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, CHECK_TOKENS, weight.shape[1], generator=generator).to(device, weight.dtype)
    with _unsharded(layer), _without_dropout(layer), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return _compare(model, layer, index, rotary, states)


def _compare(model: PreTrainedModel, layer: Any, index: int, rotary: Rotary, states: Tensor) -> LayerCheck | None:
    """Compare a layer, whose weights are there, on states (1, 4, d) behind cached ones; see :func:`check_layer`."""
    attention = layer.self_attn
    positions = torch.arange(CHECK_CACHED, CHECK_CACHED + CHECK_TOKENS, device=states.device).unsqueeze(0)
    mask = torch.zeros(1, 1, CHECK_TOKENS, CHECK_CACHED + CHECK_TOKENS, device=states.device, dtype=states.dtype)
    recorder, cache = _Recorder(), _Cache()
    keyword = cache_keyword(layer.forward, type(model).prepare_inputs_for_generation)
    stock_config = attention.config
    attention.config = copy.copy(stock_config)
    attention.config._attn_implementation = PROBE_NAME
    checkpointed = getattr(layer, "gradient_checkpointing", False)  # such a layer drops its cache
    layer.gradient_checkpointing = False
    try:
        rotation = rotary.of_layer(index, states, positions)
        layer.forward(
            states,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=rotation,
            **{str(keyword): cache, REQUEST_KEYWORD: recorder},
        )
        key, value = project_audio(layer, states)
        key = rotate(attention, key, rotation)
    except Exception as error:  # whatever a foreign layer raises means that it is not one of ours
        raise refusal(model, f"a layer cannot be run as Llama's is: {one_line(error)}") from error
    finally:
        attention.config, layer.gradient_checkpointing = stock_config, checkpointed

    reason = _difference(recorder, cache, mask, (key, value)) or _other_attention(
        recorder.calls[0], stock_config, index
    )
    if reason:
        raise refusal(model, reason)
    if not (bool(key.any()) and bool(value.any())):
        return None
    tolerance = CHECK_TOLERANCE.get(states.dtype, 1e-2)
    return LayerCheck(find_norm_offset(layer, states, rotation, (key, value), tolerance), describe_norms(layer))


def _difference(recorder: _Recorder, cache: _Cache, mask: Tensor, ours: AudioKV) -> str | None:
    """Return what in a layer's keys, values and mask is not as we would have it, or None."""
    if len(recorder.calls) != 1:
        return f"a layer calls its attention function {len(recorder.calls)} times"
    if len(cache.added) != 1:
        return f"a layer puts its keys and values into its cache {len(cache.added)} times"
    call, cached = recorder.calls[0], cache.added[0]
    if call["key"] is not cache.returned[0][0] or call["value"] is not cache.returned[0][1]:
        return "a layer changes its keys or values after caching them"
    if call["key"].shape[2] != CHECK_CACHED + CHECK_TOKENS:
        return f"a layer has {call['key'].shape[2]} keys for {CHECK_TOKENS} tokens behind {CHECK_CACHED} in its cache"
    if call["attention_mask"] is not mask:
        return "a layer changes its attention mask"
    for name, got, want in zip(("keys", "values"), ours, cached, strict=True):
        if not relative_error(got, want) <= CHECK_TOLERANCE.get(want.dtype, 1e-2):  # NaN is no less
            return f"its {name} differ from those of its projections and rotary embedding"
    return None


def _other_attention(call: dict[str, Any], config: Any, index: int) -> str | None:
    """Return what in a layer's attention is beyond our kernels, or None."""
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    extra = [name for name, argument in call.items() if name not in KNOWN_KEYWORDS and argument is not None]
    if extra:
        return f"its attention takes {', '.join(extra)}"
    types = getattr(config, "layer_types", None)
    windowed = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    layer_type = types[index] if types else ("sliding_attention" if windowed else "full_attention")
    if layer_type not in ("full_attention", "sliding_attention"):
        return f"layer {index} is of type {layer_type!r}"
    window = call.get("sliding_window")
    if (layer_type == "sliding_attention") != bool(window):
        return f"layer {index} is of type {layer_type!r} and gives its attention sliding_window={window}"
    return None
