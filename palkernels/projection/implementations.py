"""What computes the keys and values of prepared layers: the operators, or the definition."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from palkernels import reference
from palkernels.arguments import PROJECTION, TURNS, Projection
from palkernels.projection import ops
from palkernels.recompute import recomputed


def run(layers: list[Projection], impl: str, *, are_plain: bool = False) -> list[tuple[Tensor, Tensor]]:
    """K and V (A, Hkv, N, D) of each layer by "triton", "sdpa" or "reference"; the layers have one ``states``.

    Layers run one by one, but by "triton" and without gradients all of them at once. Where all tensors ``are_plain``
    ones of a GPU, and nothing watches operators, PyTorch's dispatcher is left out.

    Raises:
        NotImplementedError: forward-mode tangents or torch.func's derivatives, but with "reference".
    """
    if impl == "reference":
        arguments: list[dict[str, Any]] = [layer.tensors() | layer.numbers() for layer in layers]
        return [reference.audio_kv(**layer) for layer in arguments]
    if not are_plain:
        for reason in _transform_reasons(layers, impl):
            raise NotImplementedError(reason)
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


def _transform_reasons(layers: list[Projection], impl: str) -> list[str]:
    """Why the operators raise on forward-mode tangents, which PyTorch would drop without a word, and on torch.func's
    derivatives."""
    if torch.compiler.is_compiling():
        return []
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    tensors = [(name, tensor) for layer in layers for name, tensor in layer.tensors().items()]
    dual = sorted({name for name, tensor in tensors if unpack(tensor).tangent is not None})
    if dual:
        return [f"audio_kv with impl={impl!r} must not be given forward-mode tangents, got them for {dual}"]
    wrapped = sorted({name for name, tensor in tensors if torch._C._functorch.is_gradtrackingtensor(tensor)})
    message = f"audio_kv with impl={impl!r} must not be differentiated by torch.func, got {wrapped} of a transform"
    return [message] if wrapped else []


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
