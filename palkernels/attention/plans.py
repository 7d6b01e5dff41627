"""Where attention's plans are kept and found. See :mod:`palkernels.plans`; needs no triton.

A decoding step looks like the one before but for one more text key. Such a call finds the plan of that one by a second
key, which leaves out the number of text keys, and derives its own by a few integers.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from palkernels.kernels.operands import Matrix
from palkernels.plans import ALIGNMENT, Geometry, Plans

if TYPE_CHECKING:
    from palkernels.attention.repetition import BackwardPlan, ForwardPlan

FORWARD: "Plans[ForwardPlan]" = Plans()
GROWING: "Plans[ForwardPlan]" = Plans()  # by what stays as the text grows
BACKWARD: "Plans[BackwardPlan]" = Plans()


def derive(seen: Geometry, tensors: Sequence[Tensor | None]) -> "ForwardPlan | None":
    """The plan of a call of a new geometry by that of a shorter or longer text; None where there is none."""
    growing = without_text_keys(seen, tensors)
    base = None if growing is None else GROWING.get(growing)
    if base is None:
        return None
    plan = base.grown(tensors)
    FORWARD.keep(seen, plan)
    return plan


def keep(seen: Geometry, tensors: Sequence[Tensor | None], plan: "ForwardPlan") -> None:
    FORWARD.keep(seen, plan)
    growing = without_text_keys(seen, tensors)
    if growing is not None:
        GROWING.keep(growing, plan)


def without_text_keys(seen: Geometry, tensors: Sequence[Tensor | None]) -> Hashable | None:
    """What a geometry shares with those of other numbers of text keys that one compiled kernel runs.

    It has all that is checked of a call, so None where the keys are not valid for the rest of it.

    Args:
        seen: the geometry.
        tensors: the call's tensors, in the order of :class:`palkernels.arguments.Call`.
    """
    query, key, value, *_ = tensors
    if query is None or key is None or value is None or not query.ndim == key.ndim == value.ndim == 4:
        return None
    batch, heads, num_keys, head_dim = key.shape
    if value.shape != key.shape or num_keys < query.shape[2]:
        return None
    window = seen.numbers[2]
    hides_nothing = isinstance(window, int) and window >= num_keys  # kernels do without it then
    signatures = seen.signatures
    types = (key.dtype, value.dtype, key.device, value.device)
    return (
        (signatures[0], *signatures[3:]),
        seen[1:],
        (batch, heads, head_dim),
        types,
        _classes(key),
        _classes(value),
        hides_nothing,
    )


def _classes(tensor: Tensor) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, of the strides of a Matrix."""
    *strides, wide = Matrix.of(tensor)[1:]
    return wide, tuple([(stride == 1, stride % ALIGNMENT == 0, stride >= 2**31) for stride in strides])
