"""Packed rows: one tensor holds the tokens of all rows, one after another, without padding between them."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from palkernels.arguments import FLOATS, Call


def heads_first(call: Call) -> Call:
    """A call in the public layout, (tokens, heads, D), in the layout of :class:`Call`, (1, heads, tokens, D): views."""
    changes = {name: tensor.transpose(0, 1).unsqueeze(0) for name, tensor in call.floats().items()}
    if call.audio_visible_from is not None:
        changes["audio_visible_from"] = call.audio_visible_from.unsqueeze(0)
    return replace(call, **changes)  # type: ignore[arg-type]


def tokens_first(out: Tensor) -> Tensor:
    """The output (1, heads, tokens, D) in the public layout, (tokens, heads, D)."""
    return out.squeeze(0).transpose(0, 1)


def row_by_row(call: Call, attention: Callable[[Call], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output (1, Hq, tokens, D) and LSE (1, Hq, tokens) from one call of ``attention`` for each row.

    The lengths are read on the host: on a GPU this waits for the device.
    """
    assert call.cu_seqlens is not None
    assert call.cu_audio is not None
    texts = boundaries(call.cu_seqlens, call.query.shape[2])
    audios = boundaries(call.cu_audio, call.audio_key.shape[2])
    index = range(len(texts)) if call.audio_index is None else clamped(call.audio_index, len(audios) - 1)
    # Without rows there are no tokens: the output of one row without tokens.
    rows = [(text, audios[audio_row]) for text, audio_row in zip(texts, index, strict=True)] or [((0, 0), (0, 0))]
    outs, lses = zip(*(attention(_row(call, text, audio)) for text, audio in rows), strict=True)
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2), torch.cat(lses, dim=2)


def boundaries(cumulative: Tensor, total: int) -> list[tuple[int, int]]:
    """First token of each row, and one past its last; within the tensor whatever the values are."""
    return [(first, max(first, last)) for first, last in itertools.pairwise(clamped(cumulative, total))]


def clamped(values: Tensor, most: int) -> list[int]:
    """The values on the host, each between 0 and ``most``."""
    return [min(max(int(value), 0), most) for value in values.tolist()]


def _row(call: Call, text: tuple[int, int], audio: tuple[int, int]) -> Call:
    """The call of one row alone, from its first token and one past its last, in the text and in the audio."""
    tensors = call.floats()
    changes: dict[str, Tensor | None] = {
        name: tensors[name][:, :, slice(*(audio if name.startswith("audio") else text))] for name in FLOATS
    }
    if call.audio_visible_from is not None:
        changes["audio_visible_from"] = call.audio_visible_from[:, slice(*audio)]
    without_packing = dict.fromkeys(("audio_index", "cu_seqlens", "cu_audio", "max_seqlen", "max_audio"))
    return replace(call, **changes, **without_packing)  # type: ignore[arg-type]
