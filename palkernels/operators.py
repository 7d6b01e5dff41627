"""PyTorch operators by plain registrations, whose dispatch takes the host a fraction of ``custom_op``'s time."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Operator: TypeAlias = torch._ops.OpOverload

_library: Any = torch.library.Library("palkernels", "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """``torch.ops.palkernels.<name>.default``: it changes none of its arguments, and returns new tensors.

    Args:
        name: its name within the namespace.
        schema: its arguments and results, such as ``(Tensor x) -> Tensor``.
        compute: runs it on any device.
        fake: makes its results, of the right shapes, strides and dtypes, without computing them.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"palkernels::{name}", fake, lib=_library)
    overload: Operator = getattr(torch.ops.palkernels, name).default
    return overload


def differentiate(operator: Operator, with_node: Callable[[Any, tuple[Any, ...]], Any]) -> None:
    """Let autograd differentiate an operator.

    Args:
        operator: what :func:`operator` returned.
        with_node: given the operator's results and its arguments, the results as outputs of an ``autograd.Function``.
            Called where a tensor among the arguments requires a gradient.
    """

    def compute(keys: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        return with_node(results, arguments) if wanted else results

    _library.impl(operator._schema.name, compute, "Autograd", with_keyset=True)


class Node(torch.autograd.Function):
    """A node of autograd's graph for results that are there already. A subclass gives it its name.

    Arguments of ``apply``: the results; ``gradients_of``, from what is saved, the results' gradients, and which
    tensors' gradients are needed, to these gradients; the results to save; and the tensors, which are saved too, as
    such, so that one changed before the backward pass raises.
    """

    @staticmethod
    def forward(ctx: Any, results: Any, gradients_of: Any, kept: Sequence[Tensor], *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)  # a result that is not used costs nothing
        ctx.gradients_of = gradients_of
        ctx.save_for_backward(*kept, *tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if all(gradient is None for gradient in upstream):
            return (None,) * (3 + len(needed))
        with torch.no_grad():
            computed = ctx.gradients_of(saved, upstream, needed)
        gradients = iter(final(computed, (*saved, *upstream)))
        return None, None, None, *(next(gradients) if need else None for need in needed)


def final(gradients: Sequence[Tensor], sources: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Gradients that know what they depend on, so that a second derivative raises wherever it would lack their term.

    PyTorch's ``once_differentiable`` ties them to nothing: where only some inputs are asked for, as by
    ``torch.autograd.grad(..., allow_unused=True)``, the term would be left out without a word.
    """
    if not torch.is_grad_enabled() or not gradients:  # no graph of the backward pass is wanted
        return gradients
    results: Sequence[Tensor] = _Final.apply(gradients, *sources)
    return results


class _Final(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *sources: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError("palkernels' operators must be differentiated once, got a derivative of their gradients")
