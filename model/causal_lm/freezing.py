"""The frozen-FFN variant of training."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def freeze_ffn(model: PreTrainedModel) -> int:
    """Stop the training of every FFN weight of a language model.

    Returns:
        The number of parameters that are frozen.

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
