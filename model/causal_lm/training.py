"""What training with audio needs besides PyTorch: less memory for the audio's keys and values, frozen FFNs."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel


def projecting_again(attend: Callable[[], Tensor]) -> Tensor:
    """``attend()``, which projects the audio and attends to it, keeping neither its keys nor its values: the backward
    pass projects again, by the same modules. The attention itself is not computed twice, its output is kept."""
    context = partial(create_selective_checkpoint_contexts, _keep_attention)
    out: Tensor = checkpoint(attend, use_reentrant=False, context_fn=context)
    return out


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name()  # of PyTorch's operators, and of ours
    attends = name == "palkernels::lal_forward" or ("attention" in name and "backward" not in name)
    return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE


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
