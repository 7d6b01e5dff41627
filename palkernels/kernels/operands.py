"""What the kernels take: tensors with their strides, the integer tensors that limit what is seen, and the sizes.

Inside a kernel the fields are read by name (``key.ptr``, ``key.token``). A field that is None is a compile-time
constant, so a kernel holds no code for what a call does not use. (Triton 3.6 compiles no tuples within tuples.)
"""

from typing import Any, NamedTuple

from torch import Tensor

from palkernels.kernels.tiles import MAX_BLOCK


class Matrix(NamedTuple):
    """A (batch, head, token, dim) tensor: its pointer and its four strides, in elements."""

    ptr: Any
    batch: Any
    head: Any
    token: Any
    dim: Any
    wide: Any  # 1 where offsets within one batch row need 64 bits, otherwise None: 32-bit offsets save registers

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Matrix":
        """The tensor with its strides; of None a Matrix whose fields are all None."""
        if tensor is None:
            return cls(None, None, None, None, None, None)
        batch, head, token, dim = tensor.stride()
        _, heads, tokens, dims = tensor.shape
        span = (heads - 1) * head + (tokens - 1) * token + (dims - 1) * dim
        slack = MAX_BLOCK * max(head, token, dim)  # a masked lane's offset is computed too
        return cls(tensor, batch, head, token, dim, 1 if span + slack >= 2**31 else None)


class Visibility(NamedTuple):
    """Pointers to the options that hide keys, as in :func:`palkernels.lal_attention`; each may be None."""

    audio_lengths: Any  # (A,)
    audio_index: Any  # (B,)
    visible_from: Any  # (B, N), strides below
    visible_from_batch: Any
    visible_from_token: Any
    text_start: Any  # (B,)
    text_end: Any  # (B,)
    cu_seqlens: Any  # (B + 1,), of packed rows only, as the next
    cu_audio: Any  # (A + 1,)

    @classmethod
    def of(
        cls,
        audio_lengths: Tensor | None = None,
        audio_index: Tensor | None = None,
        audio_visible_from: Tensor | None = None,
        text_start: Tensor | None = None,
        text_end: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_audio: Tensor | None = None,
    ) -> "Visibility":
        batch, token = (None, None) if audio_visible_from is None else audio_visible_from.stride()
        lengths, index, start, end, seqlens, audio = (
            None if x is None else x.contiguous()
            for x in (audio_lengths, audio_index, text_start, text_end, cu_seqlens, cu_audio)
        )
        return cls(lengths, index, audio_visible_from, batch, token, start, end, seqlens, audio)


class Scales(NamedTuple):
    """What audio keys and values in eight bits are to be multiplied by, per audio row and K/V head; None: nothing."""

    key: Any  # (A, Hkv), float32, contiguous
    value: Any

    @classmethod
    def of(cls, *scales: Tensor | None) -> "Scales":
        return cls(*(None if scale is None else scale.contiguous() for scale in scales))


class Sizes(NamedTuple):
    """Built inside the kernels, whose size arguments are plain integers so that they are not specialised on."""

    num_queries: Any  # T; of packed rows the longest's, as the two below
    num_keys: Any  # S
    num_audio: Any  # N
    num_audio_rows: Any  # A
    num_batches: Any  # B
    num_kv_heads: Any  # Hkv
    text_tokens: Any  # T; of packed rows all of them together, as the one below
    audio_tokens: Any  # N
    window: Any  # or None


class Text(NamedTuple):
    """One text row, built inside the kernels: where it lies, and which of its keys are valid."""

    batch: Any  # 0 where rows are packed
    first: Any  # its first token there; 0 unless rows are packed
    num_queries: Any
    num_keys: Any
    start: Any  # valid keys are those from start on, below end
    end: Any  # one past the last query's


class Audio(NamedTuple):
    """One audio row, built inside the kernels: where it lies, and how many of its tokens are valid."""

    batch: Any  # 0 where rows are packed
    first: Any
    num_tokens: Any
    length: Any  # valid ones


# For triton.jit: new lengths compile no new kernels. (Strides do, where they cease to be multiples of 16.)
UNSPECIALISED = list(Sizes._fields)
