"""The one mechanism for audio keys and values that are not kept for the backward pass but made again there.

Two sides would keep them: the projection that makes them, with all that its modules save, and the attention that reads
them. :func:`recomputed` sees to both. The projection runs under PyTorch's checkpoint, so it may be anything: adapters,
quantised or sharded layers, hooks, dropout. The checkpoint's last step saves keys and values with a node of its own;
whoever reads that node has them made again. Within :func:`instead_of_saving`, attention keeps a :class:`Recipe`, which
reads the node, where it would keep the tensors. So the backward pass makes keys and values once, for both sides; and
attention, which lies outside of the checkpoint, is not computed again.

``audio_kv(recompute=True)`` and the model layer's ``recompute_audio_kv`` are this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from palkernels import dtypes
from palkernels.arguments import Call

_ATTRIBUTE = "_palkernels_recipe"


def recomputed(
    make: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor, *, preserve_rng_state: bool = True
) -> tuple[Tensor, Tensor]:
    """``make(states)``: keys and values that neither ``make`` nor :func:`palkernels.lal_attention` keeps.

    The backward pass calls ``make`` once more, under the same autocast. Attention must get the two tensors as they are
    returned, not as views or copies. Without gradients this is a plain call.

    Args:
        make: from audio states (A, N, d) to keys and values (A, Hkv, N, D), differentiable.
        states: what ``make`` is called with; on the device that it draws random numbers on, if it draws any.
        preserve_rng_state: whether ``make`` draws the same random numbers again.
    """
    if not torch.is_grad_enabled():
        return make(states)
    if torch.compiler.is_compiling():  # the compiler knows PyTorch's checkpoint, and no hooks
        compiled: tuple[Tensor, Tensor] = checkpoint(
            make, states, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
        return compiled

    def make_and_save(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # In the dtype that attention computes in: else it would copy them under autocast, and keep the copies.
        key, value = (made.to(dtypes.computed_in(made, made.device)) for made in make(states))
        if dtypes.EIGHT_BITS in (key.dtype, value.dtype):
            got = f"{key.dtype} and {value.dtype}"
            raise TypeError(f"keys and values that are made again must have gradients, got {got}")
        anchor: Tensor = _Save.apply(key.new_empty(0).requires_grad_(), key.detach(), value.detach())
        return key, value, anchor

    # The checkpoint looks for the device at its argument, and saves it, which inference tensors cannot be.
    argument = torch.empty(0, device=states.device) if states.is_inference() else states

    def checkpointed(argument: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return make_and_save(states if states.is_inference() else argument)

    key, value, anchor = checkpoint(checkpointed, argument, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    recipe = Recipe(anchor)
    for which, tensor in enumerate((key, value)):
        setattr(tensor, _ATTRIBUTE, (recipe, which))
        if tensor._base is not None:  # it is the base of the tensor's own views too, which are told by its mark
            setattr(tensor._base, _ATTRIBUTE, (recipe, which))
    return key, value


class _Save(torch.autograd.Function):
    """A node that saves keys and values. Its output, of no elements, keeps it alive; nothing is derived from it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(key, value)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None, None]:
        return None, None, None


class Recipe:
    """What attention keeps in place of one pair of keys and values."""

    def __init__(self, anchor: Tensor):
        self.anchor = anchor  # the output of _Save, within the checkpoint
        self.uses = [0, 0]  # how many times autograd would have kept the keys, and the values
        self.backward_pass = -1  # PyTorch's number of the one that the two below belong to
        self.made: list[Tensor | None] = [None, None]
        self.left = [0, 0]  # of the uses, those for which the backward pass has not asked yet

    def keep(self, which: int) -> "tuple[Recipe, int]":
        """What autograd keeps for one use of the keys (0) or the values (1)."""
        self.uses[which] += 1
        return self, which

    def make(self, which: int) -> Tensor:
        """The keys (0) or the values (1). A backward pass makes both once, and each goes when it is asked for last."""
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self.backward_pass or not self.left[which]:
            node: Any = self.anchor.grad_fn
            self.left = list(self.uses)
            self.made = [made if uses else None for made, uses in zip(node.saved_tensors, self.uses, strict=True)]
            self.backward_pass = backward_pass
        made = self.made[which]
        assert made is not None
        self.left[which] -= 1
        if not self.left[which]:
            self.made[which] = None
        return made


def problems_of(call: Call, computed: Call) -> list[Exception]:
    """Why attention would silently keep audio keys and values that :func:`recomputed` was to make again.

    Attention knows these keys and values only as the tensors that :func:`recomputed` returned. It misses them where a
    caller passes views of those tensors, or where autocast copies them into another dtype.

    Args:
        call: the caller's arguments.
        computed: the arguments that attention computes with, after autocast.
    """
    if torch.compiler.is_compiling():
        return []
    problems: list[Exception] = []
    for name in ("audio_key", "audio_value"):
        tensor = getattr(call, name)
        recipe = getattr(tensor, _ATTRIBUTE, None)
        if are_views(tensor):
            problems.append(ValueError(f"{name} must be what audio_kv(recompute=True) returned, got a view of it"))
        elif recipe is not None and getattr(computed, name) is not tensor:
            wanted, got = getattr(computed, name).dtype, tensor.dtype
            problems.append(TypeError(f"{name} of audio_kv(recompute=True) must have autocast's {wanted}, got {got}"))
    return problems


def are_views(*tensors: Tensor) -> bool:
    """Whether one of these tensors is a view of keys or values that are made again, which attention could not tell."""
    for tensor in tensors:  # noqa: SIM110 (a generator takes several calls)
        if hasattr(tensor._base, _ATTRIBUTE) and not hasattr(tensor, _ATTRIBUTE):
            return True
    return False


def compile_problems(recompute: bool) -> list[Exception]:
    """Why audio_kv refuses ``recompute`` now, if it does."""
    if not (recompute and torch.compiler.is_compiling()):
        return []
    message = "recompute must be False under torch.compile, which chooses itself what to recompute"
    return [NotImplementedError(message)]


@contextmanager
def instead_of_saving(*tensors: Tensor) -> Iterator[None]:
    """Within the context autograd keeps the recipe of each of these tensors that has one.

    All other tensors go where they would have gone: to the saved-tensor hooks that were in force.
    """
    # By where they lie, not as tensors: what the hooks hold lives as long as the graph.
    marks = {_place(tensor): mark for tensor in tensors if (mark := getattr(tensor, _ATTRIBUTE, None)) is not None}
    if not marks or not torch.is_grad_enabled():
        yield
        return
    outer: tuple[Callable[..., Any], Callable[..., Any]] | None
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(tensor: Tensor) -> tuple[bool, Any]:
        mark = marks.get(_place(tensor))
        if mark is not None:
            recipe, which = mark
            return True, recipe.keep(which)
        if outer is not None:
            return False, outer[0](tensor)
        # Without its node: a saved output would hold the node that saves it, a circle that nothing frees. PyTorch's own
        # check for changes in place is not made for what hooks keep, so its number of changes is kept too.
        saved = tensor.detach()
        return False, (saved, None if saved.is_inference() else saved._version)

    def unpack(packed: tuple[bool, Any]) -> Tensor:
        is_recipe, kept = packed
        if is_recipe:
            recipe, which = kept
            made: Tensor = recipe.make(which)
            return made
        if outer is not None:
            unpacked: Tensor = outer[1](kept)
            return unpacked
        saved, version = kept
        if version is not None and saved._version != version:
            raise RuntimeError(
                "what attention saves for its backward pass must not change in place before it, got a change"
            )
        tensor: Tensor = saved
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, fake ones too: its storage, and the view of it."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
