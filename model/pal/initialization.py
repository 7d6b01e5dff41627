"""Where untrained connectors begin: at the state of an attention sink.

Every token of a text attends to the first, which has nothing to say: its states are large in a few dimensions, the same
ones in almost all layers whatever the token is, so their keys draw attention, and their values are small ("attention
sinks", arXiv 2309.17453; "massive activations", arXiv 2402.17762). Audio that begins there is attended to at once and
changes little of what the language model says: training starts near the loss of the text alone, and what it adds to the
states is heard from the first step on. Small states would not do: a layer's norm takes the length from the states that
it is given, and keys and values see their direction alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from palkernels.model.causal_lm.support import base_model, find_decoder
from palkernels.model.connectors.base import Connector, has_values, start_linear_at
from palkernels.model.pal.configuration_pal import PalConfig

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["INITIALIZATIONS", "check_initialization", "sink_directions", "start_at_sink"]

INITIALIZATIONS = ("sink", "random")
TEXTS, SEED = 32, 0  # random texts of one token, as a first token sees no other


def check_initialization(initialization: str) -> None:
    """Raise a ValueError for a name that is not in ``INITIALIZATIONS``."""
    if initialization not in INITIALIZATIONS:
        names = " or ".join(f'"{name}"' for name in INITIALIZATIONS)
        raise ValueError(f"initialization must be {names}, got {initialization!r}")


def sink_directions(language_model: PreTrainedModel, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the directions of the states h that each of ``layers`` is given for a text's first token: that of their
    mean, (d,), and each layer's own, (layers, d), in float32.

        u_l = m_l / |m_l|,  u = m / |m|;  m_l = mean over texts of h_l,  m = mean over layers of m_l

    In u the layers count for most in which the sink is largest. The texts are random tokens, always the same, so that
    the language model decides and nothing else.
    """
    model = base_model(language_model)
    decoder = find_decoder(model)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.config.vocab_size, (TEXTS, 1), generator=generator, device="cpu")
    with _inputs_of(decoder.layers) as inputs, _evaluating(decoder), torch.no_grad():
        decoder(input_ids=tokens.to(model.device), use_cache=False)
    means = torch.stack([inputs[layer][:, 0].float().mean(dim=0).to(model.device) for layer in layers])
    return _unit(means.mean(dim=0)), _unit(means)


def start_at_sink(
    config: PalConfig, language_model: PreTrainedModel, connectors: nn.ModuleList, projectors: nn.ModuleDict
) -> None:
    """Move what untrained parts make of LAL's audio to the sink of the layers that hear it, as
    :meth:`Connector.start_at` does: that of all layers which share a connector's states, or by a projection for each
    layer to its own, where the connector stays as it was drawn.

    Parts of other integrations stay, and all parts of a model without values, on the meta device.
    """
    layers = config.lal_layers()
    if not layers or not has_values(*language_model.parameters()):
        return
    shared, by_layer = sink_directions(language_model, layers)
    for layer, projector in projectors.items():
        start_linear_at(cast(nn.Linear, projector), by_layer[layers.index(int(layer))])
    for connector, entry in zip(connectors, config.encoders, strict=True):
        if entry["integration"] == "lal" and not projectors:
            cast(Connector, connector).start_at(shared)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


@contextmanager
def _inputs_of(layers: nn.ModuleList) -> Iterator[dict[int, Tensor]]:
    """Give a dict that each layer's first argument enters, by the layer's index, when it runs."""
    inputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    hooks: list[RemovableHandle] = [
        layer.register_forward_pre_hook(keep(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Drop nothing out within, and leave each submodule's mode as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
