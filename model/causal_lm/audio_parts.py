"""What ``attach`` adds to a language model: the connector and the per-layer projectors, as one submodule of it.

So whatever walks over a model's parameters reaches them: ``to`` and ``half``, optimizers, DDP and FSDP2, state dicts.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NAME = "palkernels_audio"  # of the submodule, and so what its keys in a state dict begin with
CONNECTOR = "connector"
ENCODED = Tensor | tuple[Tensor, ...]  # of one encoder, or of several


class AudioParts(nn.Module):
    """The connector and the projectors of an attached model.

    Args:
        connector: turns an encoder's states into the model's; or None.
        projectors: by layer, turn the connector's output into the layer's states; or None.
    """

    def __init__(self, connector: nn.Module | None, projectors: Mapping[int, nn.Module] | None) -> None:
        super().__init__()
        self.connector = connector
        per_layer = {} if projectors is None else projectors
        self.projectors = nn.ModuleDict({str(layer): projector for layer, projector in per_layer.items()})
        self.register_load_state_dict_post_hook(keep_where_there_is_nothing)  # type: ignore[no-untyped-call]

    def forward(
        self, encoded: ENCODED | None, lengths: Tensor | None = None
    ) -> tuple[Tensor | dict[int, Tensor], Tensor | None] | Tensor:
        """Return the states of all layers, or those of each by its index, and their lengths.

        Args:
            encoded: the states of an encoder, or of several; None: a zero is returned, whose gradient gives every
                parameter a gradient of zeros.
            lengths: as in ``LalHandle.state``.
        """
        if encoded is None:
            return zero(self.parameters())
        from palkernels.model.connectors.base import Connector, cut_padding  # attach alone needs no connector

        states: Any = encoded
        if isinstance(unwrapped(self.connector), Connector):
            states, lengths = self.connector.connect(cut_padding(encoded, lengths), lengths)  # type: ignore[union-attr, operator]
        elif self.connector is not None:
            states = self.connector(encoded)
        if self.projectors:
            states = {int(layer): projector(states) for layer, projector in self.projectors.items()}
        return states, lengths


def check_widths(connector: nn.Module | None, projectors: Mapping[int, nn.Module] | None, width: int) -> None:
    """Check that what makes the model's states makes them as wide as they are, where its kind says how wide that is.

    Raises:
        ValueError: a connector of ours or a Linear gives another width than the projectors or the model take.
    """
    given = None if connector is None else _widths(connector)[1]
    if projectors:
        for layer, projector in projectors.items():
            taken, made = _widths(projector)
            if given is not None and taken is not None and taken != given:
                raise ValueError(f"projector {layer} must take the connector's width {given}, got {taken}")
            if made is not None and made != width:
                raise ValueError(f"projector {layer} must give the model's hidden size {width}, got {made}")
    elif given is not None and given != width:
        raise ValueError(f"the connector must give the model's hidden size {width}, got {given}")


def _widths(module: nn.Module) -> tuple[int | None, int | None]:
    """Return the widths that a module takes and gives, None where its kind does not say."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    from palkernels.model.connectors.base import Connector  # attach alone needs no connector

    return None, module.config["hidden_size"] if isinstance(module, Connector) else None


def unwrapped(module: Any) -> Any:
    """Return the copy of a module that peft trains, where ``modules_to_save`` names it; else the module itself."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict) or not hasattr(module, "original_module"):
        return module
    active = [copies[name] for name in module.active_adapters if name in copies]
    return module.original_module if module.disable_adapters or not active else active[0]


def keep_where_there_is_nothing(module: nn.Module, incompatible: Any) -> None:
    """Let a stock model's state dict be loaded, which says nothing of these parts: they keep their weights, with a
    warning."""
    ours = {key for key in incompatible.missing_keys if f"{NAME}." in key and ".original_module." not in key}  # peft's
    if ours and len(ours) == len(module.state_dict()):
        warnings.warn(
            f"the state dict holds no {NAME}: connector and projectors keep the weights that they have", stacklevel=2
        )
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in ours]


class _Zero(torch.autograd.Function):
    """0, whose gradient is one of zeros for every parameter."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class _Tied(torch.autograd.Function):
    """A tensor as it is, whose backward pass reaches a second one too, with a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.anchor = anchor.dtype, anchor.device
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.anchor
        return gradients[0], torch.zeros((), dtype=dtype, device=device)


def zero(parameters: Iterable[Tensor]) -> Tensor:
    """Return 0, whose backward pass gives those parameters that train a gradient of zeros: see :func:`tied`."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _Zero.apply(*trained) if trained else torch.zeros(())


def tied(arguments: dict[str, Any], anchor: Tensor, embed: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return a forward's arguments, its text embedded bitwise as it is, with ``anchor`` in the backward pass.

    A batch without audio so gives the parts that only audio passes a gradient of zeros, which DDP and FSDP2 wait for.
    Tied to the input embeddings, it comes last in the backward pass, where the audio's gradient comes too: all
    processes then run the same collectives in the same order.
    """
    if not anchor.requires_grad:
        return arguments
    embeddings = arguments.get("inputs_embeds")
    if embeddings is None and isinstance(arguments.get("input_ids"), Tensor):
        embeddings = embed(arguments["input_ids"])
        arguments = {name: value for name, value in arguments.items() if name != "input_ids"}
    if embeddings is None:
        return arguments
    return arguments | {"inputs_embeds": _Tied.apply(embeddings, anchor)}
