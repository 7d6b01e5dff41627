"""A layer's keys and values of audio, by its own input norm, projections and RoPE, without any query."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["audio_keys_and_values", "check_layer"]

CLOSE = 0.02  # of the largest key or value: products of other shapes round differently, also in bfloat16


def audio_keys_and_values(layer: Any, states: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys and values (n, heads, head size) of audio in a decoder layer of vLLM's.

    Args:
        layer: the layer.
        states: (n, d) of the audio.
        positions: (n,) in their requests; None: keys are not rotated.
    """
    attention: Any = layer.self_attn
    key, value = _projected(attention, layer.input_layernorm(states))
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key.reshape(len(states), -1, attention.head_dim)).flatten(-2)
    if positions is not None:
        key = attention.rotary_emb(positions, key.contiguous(), None)[0]
    by_head = (len(states), -1, attention.head_dim)
    return key.reshape(by_head).contiguous(), value.reshape(by_head).contiguous()


def _projected(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of normed states as the projection makes them."""
    projection = attention.qkv_proj
    both = 2 * attention.kv_size
    weight = getattr(projection, "weight", None)
    # Quantised weights, and the packed ones of vLLM's CPU build, have other shapes: there queries are made in vain.
    if isinstance(weight, Tensor) and weight.shape == (attention.q_size + both, hidden.shape[-1]):
        bias = None if projection.bias is None else projection.bias[attention.q_size :]
        made = nn.functional.linear(hidden, weight[attention.q_size :], bias)
    else:
        made = projection(hidden)[0][..., attention.q_size :]
    key, value = made.chunk(2, dim=-1)
    return key, value


class _Attended(Exception):  # noqa: N818 - no error: it leaves a layer once its keys are known
    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value


class _Witness(nn.Module):
    """Stands in for a layer's attention, and tells what it is given."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Attended(key, value)


def check_layer(layer: Any, number: int, width: int, dtype: torch.dtype) -> None:
    """Check that a layer makes of text the keys and values that it is taken to make of audio.

    It runs up to its attention on a few random states. A model is known by what it does, not by its name.

    Args:
        layer: the layer.
        number: its number, for the error.
        width: of the states.
        dtype: of the states.

    Raises:
        ValueError: its keys or values differ, or it is built in another way.
    """
    device = next(layer.parameters()).device
    states = torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    positions = torch.tensor([0, 1, 2, 11, 40], device=device)
    try:
        expected = _attended(layer, states.clone(), positions)
        made = audio_keys_and_values(layer, states.clone(), positions)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"layer {number} must be built as Llama's is, to be given audio, got {error}") from error
    for name, ours, its in zip(("keys", "values"), made, expected, strict=True):
        ours, its = ours.flatten(1).float(), its.flatten(1).float()
        if ours.shape != its.shape or bool((ours - its).abs().max() > CLOSE * its.abs().max()):
            raise ValueError(
                f"layer {number} must make its {name} by input norm, projection, norm of keys and RoPE, to be given "
                f"audio, got other {name}: {type(layer).__name__}"
            )


def _attended(layer: Any, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values that a layer's attention is given.

    Raises:
        AttributeError: the layer has no attention where it is looked for.
    """
    attention = layer.self_attn.attn
    layer.self_attn.attn = _Witness()
    try:
        layer(positions, states, None)
    except _Attended as attended:
        return attended.key, attended.value
    finally:
        layer.self_attn.attn = attention
    raise AttributeError("an attention that is not called")
