"""What a caller says about the audio: its states, which text reads which, and where it stands in the text."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from palkernels import devices
from palkernels.model.causal_lm.moving import Movable

DECREASES = "insert_at must not decrease along a row's audio tokens, got a decreasing row"


@dataclass(frozen=True, eq=False)
class AudioState(Movable):
    """Audio for one batch of texts, given to an attached model as ``audio=``.

    Args:
        states: (A, N, d) hidden states in the model's width, dtype and device, shared by all layers; or a list with
            one such tensor per model layer and None where a layer takes no audio (all of one A and N).
        lengths: (A,) valid tokens of each audio row, which come first; None: all N.
        index: (B,) the audio row that each text row reads; None: A == B, row for row. A text without audio points
            at a row of length 0.
        insert_at: where the audio stands in the row's own text, in tokens without padding, counted from the start
            of the conversation. (B,), or (B, N) non-decreasing for several clips in one row; None: before the text.
            Text before it does not see the audio; the prompt's length means that only generated tokens do. A forward
            that may return a cache takes places behind its text, as the rest may come in the next one; in training and
            with ``use_cache=False`` they are refused.

    B is the prompt's batch size: ``generate`` expands it for beams and several returned sequences. A state may be
    used again, with other texts and other models.

    Integer tensors may have any integer dtype; they are kept as int64. Their values are checked on a CPU. On another
    device the kernels clamp lengths and indices, and the forward checks that insert_at does not decrease.

    Raises:
        TypeError, ValueError: fields do not fit each other.
    """

    states: Tensor | Sequence[Tensor | None]
    lengths: Tensor | None = None
    index: Tensor | None = None
    insert_at: Tensor | None = None
    # The sum of the lengths, where values are looked at anyway.
    valid_tokens: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        tensors = self._tensors()
        if not tensors:
            raise ValueError("states must hold at least one tensor, got none")
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"states must be floating-point tensors, got {_type_name(tensor)}")
            if tensor.ndim != 3 or tensor.shape != tensors[0].shape:
                shapes = [tuple(x.shape) for x in tensors]
                raise ValueError(f"states must be (A, N, d), of one shape in all layers, got {shapes}")
            if (tensor.dtype, tensor.device) != (tensors[0].dtype, tensors[0].device):
                raise ValueError("states must share one dtype and device in all layers")
        rows, tokens = self.num_rows, self.num_tokens
        for name in ("lengths", "index", "insert_at"):
            self._check_integers(name)
        if self.lengths is not None:
            if self.lengths.shape != (rows,):
                raise ValueError(f"lengths must be (A,) = ({rows},), got shape {tuple(self.lengths.shape)}")
            self._check_range("lengths", 0, tokens)
            if self.checks_values:
                object.__setattr__(self, "valid_tokens", int(self.lengths.sum()))
        if self.index is not None:
            if self.index.ndim != 1:
                raise ValueError(f"index must be (B,), got shape {tuple(self.index.shape)}")
            self._check_range("index", 0, rows - 1)
        if self.insert_at is not None:
            shape = tuple(self.insert_at.shape)
            if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != tokens):
                raise ValueError(f"insert_at must be (B,) or (B, N) with N = {tokens}, got shape {shape}")
            if shape[0] != self.batch_size:
                raise ValueError(f"insert_at must have a row per text row = {self.batch_size}, got shape {shape}")
            self._check_range("insert_at", 0, None)
            if len(shape) == 2 and self.checks_values and bool(decreases(self.insert_at)):
                raise ValueError(DECREASES)

    def _tensors(self) -> list[Tensor]:
        if isinstance(self.states, Tensor):
            return [self.states]
        if not isinstance(self.states, Sequence) or isinstance(self.states, str):
            raise TypeError(f"states must be a tensor or a list of them, got {_type_name(self.states)}")
        return [tensor for tensor in self.states if tensor is not None]

    def _check_integers(self, name: str) -> None:
        tensor = getattr(self, name)
        if tensor is None:
            return
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_type_name(tensor)}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on the states' device {self.device}, got {tensor.device}")
        object.__setattr__(self, name, tensor.to(torch.int64))

    def _check_range(self, name: str, least: int, most: int | None) -> None:
        tensor = getattr(self, name)
        if not self.checks_values or not tensor.numel():
            return
        low, high = int(tensor.min()), int(tensor.max())
        if low < least or (most is not None and high > most):
            allowed = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"{name} must be {allowed}, got values from {low} to {high}")

    def for_layer(self, layer: int) -> Tensor | None:
        """Return the states (A, N, d) that one layer takes, None where it takes none."""
        return self.states if isinstance(self.states, Tensor) else self.states[layer]

    @property
    def num_rows(self) -> int:
        """Audio rows, A."""
        return self._tensors()[0].shape[0]

    @property
    def num_tokens(self) -> int:
        """Audio tokens of each audio row, padding included, N."""
        return self._tensors()[0].shape[1]

    @property
    def hidden_size(self) -> int:
        return self._tensors()[0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self._tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether a backward pass goes on into what made the states."""
        return any(tensor.requires_grad for tensor in self._tensors())

    @property
    def checks_values(self) -> bool:
        """Whether the state has looked at values: on another device that would wait for everything queued there, and
        ``torch.compile`` has none."""
        return devices.is_host(self.device) and not torch.compiler.is_compiling()

    @property
    def batch_size(self) -> int:
        """Texts of the prompt, B."""
        return self.num_rows if self.index is None else self.index.shape[0]


def decreases(insert_at: Tensor) -> Tensor:
    """Return whether any row of insert_at (B, N) decreases, as a tensor of one bool."""
    return (insert_at.diff(dim=1) < 0).any()


def _type_name(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
