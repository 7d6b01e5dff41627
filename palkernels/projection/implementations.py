"""What computes the keys and values of prepared layers: the operators, or the definition."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from palkernels import reference
from palkernels.arguments import PROJECTION, TURNS, Projection
from palkernels.projection import ops
from palkernels.recompute import recomputed


def run(layers: list[Projection], impl: str, *, are_plain: bool = False) -> list[tuple[Tensor, Tensor]]:
    """K and V (A, Hkv, N, D) of each layer by "triton", "sdpa" or "reference"; the layers have one ``states``.

    Layers run one by one, but by "triton" and without gradients all of them at once. Where all tensors ``are_plain``
    ones of a GPU, and nothing watches operators, PyTorch's dispatcher is left out.
    """
    if impl == "reference":
        arguments: list[dict[str, Any]] = [layer.tensors() | layer.numbers() for layer in layers]
        return [reference.audio_kv(**layer) for layer in arguments]
    fused = impl == "triton"
    tensors = [tensor for layer in layers for tensor in layer.tensors().values()]
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if len(layers) == 1 or with_gradients or not fused:
        compute = ops.direct if are_plain else ops.audio_kv_forward
        return [compute(*layer.arguments(), fused) for layer in layers]
    first = layers[0]
    lists = [[getattr(layer, name) for layer in layers] for name in (*PROJECTION[1:], *TURNS)]
    compute_all = ops.layers_forward if are_plain else ops.audio_kv_layers
    out = compute_all(first.states, *lists, *first.numbers().values())
    return [(pair[0].transpose(1, 2), pair[1].transpose(1, 2)) for pair in out.unbind(0)]


def run_recomputed(layer: Projection, impl: str) -> tuple[Tensor, Tensor]:
    """K and V of one layer as :func:`run` gives them, for attention that makes them again in its backward pass.

    The backward pass raises RuntimeError if one of the layer's tensors has changed by then.
    """
    # Inference tensors have no number of changes.
    versions = {name: tensor._version for name, tensor in layer.tensors().items() if not tensor.is_inference()}

    def make(states: Tensor) -> tuple[Tensor, Tensor]:
        for name, tensor in layer.tensors().items():
            if name in versions and tensor._version != versions[name]:
                raise RuntimeError(f"{name} must not change between audio_kv(recompute=True) and the backward pass")
        (made,) = run([replace(layer, states=states)], impl)
        return made

    return recomputed(make, layer.states, preserve_rng_state=False)
