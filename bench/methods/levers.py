"""Levers: LAL with one more way of saving training memory, at a price."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from palkernels.bench.methods.base import Batch, Style
from palkernels.bench.methods.lal import Lal
from palkernels.model import LalConfig

__all__ = ["LalCheckpoint", "LalFusedLoss", "LalRecompute"]


class _Lever(Lal):
    """What all levers have in common. They leave inference as it is, so they have no figures there."""

    modes = ("train",)
    in_figure1 = False
    is_lever = True
    step = None


class LalRecompute(_Lever):
    """The audio's keys and values are not kept, but projected again in the backward pass."""

    name = "lal-recompute"
    label = "LAL, recomputed K/V"
    about = "lal with recompute_audio_kv=True"
    style = Style("#3a9d5d", "P")

    def config(self, impl: str) -> LalConfig:
        return LalConfig(layers="all", rope="sequence", impl=impl, recompute_audio_kv=True)


class LalCheckpoint(_Lever):
    """Gradient checkpointing: each layer keeps its input alone and runs again in the backward pass."""

    name = "lal-checkpoint"
    label = "LAL, checkpointed"
    about = "lal with gradient checkpointing (non-reentrant)"
    style = Style("#7b5ea7", "X")

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        with super().ready(model, impl) as attention:
            was_training = model.training
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            try:
                yield attention
            finally:
                model.gradient_checkpointing_disable()
                model.train(was_training)


class LalFusedLoss(_Lever):
    """Liger-Kernel's loss, which makes logits and their gradients for a few tokens at a time."""

    name = "lal-fused-loss"
    label = "LAL, fused loss"
    about = "lal with Liger-Kernel's fused linear cross-entropy"
    style = Style("#c76ba0", "p")

    def why_not(self, device: torch.device) -> str | None:
        if find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        return None if device.type == "cuda" else "needs a GPU"

    @contextmanager
    def ready(self, model: Any, impl: str = "auto") -> Iterator[str]:
        import liger_kernel.transformers.functional  # noqa: F401 (outside of what is measured)

        with super().ready(model, impl) as attention:
            yield attention

    def loss(self, model: Any, connector: nn.Module, batch: Batch) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        # The stock forward with logits of no token, so that audio takes its usual way. The hook takes the output of the
        # last norm, from which the logits would be made.
        normed: list[Tensor] = []
        hook = model.get_decoder().register_forward_hook(lambda module, args, out: normed.append(out[0]))
        try:
            model(**self.inputs(model, connector, batch), use_cache=False, logits_to_keep=slice(0, 0))
        finally:
            hook.remove()
        hidden = normed[0][:, :-1].reshape(-1, normed[0].shape[-1])
        loss: Tensor = liger_fused_linear_cross_entropy(hidden, model.lm_head.weight, batch.labels[:, 1:].reshape(-1))
        return loss
