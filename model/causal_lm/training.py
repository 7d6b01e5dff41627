"""What training with audio needs besides PyTorch: frozen FFNs."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def freeze_ffn(model: PreTrainedModel) -> int:
    """Frozen-FFN training: no FFN weight of the language model is updated. Returns how many parameters are frozen.

    Raises:
        ValueError: a decoder layer has no ``mlp``.
    """
    decoder: Any = model.get_decoder()
    parameters: list[nn.Parameter] = []
    for index, layer in enumerate(decoder.layers):
        if not isinstance(getattr(layer, "mlp", None), nn.Module):
            raise ValueError(f"every layer must have its FFN as mlp, got {type(layer).__name__} as layer {index}")
        parameters += layer.mlp.parameters()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters)
