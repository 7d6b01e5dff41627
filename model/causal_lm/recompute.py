"""Training with less memory: the audio's keys and values are not kept for the backward pass, but projected again."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def projecting_again(attend: Callable[[], Tensor]) -> Tensor:
    """Run ``attend``, which projects the audio and attends to it, without keeping the audio's keys and values.

    The backward pass calls the same modules again to project them. It does not attend again: the attention's output is
    kept.
    """
    context = partial(create_selective_checkpoint_contexts, _keep_attention)
    out: Tensor = checkpoint(attend, use_reentrant=False, context_fn=context)
    return out


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the output of every attention operator, of PyTorch's and of ours; compute everything else again."""
    name = operator.name()
    attends = name == "palkernels::lal_forward" or ("attention" in name and "backward" not in name)
    return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE
