"""Packed rows: one tensor holds the tokens of all rows, one after another, without padding between them."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from palkernels.attention.call import FLOATS, Call


def heads_first(call: Call) -> Call:
    """From the public layout, (tokens, heads, D), to that of a :class:`Call`: views, no copies."""
    changes = {name: tensor.transpose(0, 1).unsqueeze(0) for name, tensor in call.floats().items()}
    if call.audio_visible_from is not None:
        changes["audio_visible_from"] = call.audio_visible_from.unsqueeze(0)
    return replace(call, **changes)  # type: ignore[arg-type]


def tokens_first(out: Tensor) -> Tensor:
    """And back: (1, heads, tokens, D) as (tokens, heads, D)."""
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
    # Without rows there are no tokens: the output of one row of none.
    places = [(text, audios[row]) for text, row in zip(texts, index, strict=True)] or [((0, 0), (0, 0))]
    outs, lses = zip(*(attention(_row(call, text, audio)) for text, audio in places), strict=True)
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2), torch.cat(lses, dim=2)


def boundaries(cumulative: Tensor, total: int) -> list[tuple[int, int]]:
    """First token of each row, and one past its last; within the tensor whatever the values are."""
    places = clamped(cumulative, total)
    return [(first, max(first, last)) for first, last in itertools.pairwise(places)]


def clamped(values: Tensor, most: int) -> list[int]:
    return [min(max(int(value), 0), most) for value in values.tolist()]


def _row(call: Call, text: tuple[int, int], audio: tuple[int, int]) -> Call:
    tensors = call.floats()
    changes: dict[str, Tensor | None] = {
        name: tensors[name][:, :, slice(*(audio if name.startswith("audio") else text))] for name in FLOATS
    }
    if call.audio_visible_from is not None:
        changes["audio_visible_from"] = call.audio_visible_from[:, slice(*audio)]
    unpacked = dict.fromkeys(("audio_index", "cu_seqlens", "cu_audio", "max_seqlen", "max_audio"))
    return replace(call, **changes, **unpacked)  # type: ignore[arg-type]
