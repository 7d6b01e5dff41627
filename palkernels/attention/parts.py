"""The two sets of keys that :mod:`palkernels.attention.sdpa` attends to, each with the mask that it needs, if any."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAST_CAUSAL_SCALE = 1e-30  # PyTorch's fused kernels hide keys by -inf before they scale: NaN for 0, seen below 0


@dataclass(frozen=True)
class Settings:
    """What masks and scores depend on besides queries, keys and values: the options of one :class:`Call`."""

    scale: float
    softcap: float | None
    window: int | None
    audio_lengths: Tensor | None
    audio_index: Tensor | None
    audio_visible_from: Tensor | None
    text_start: Tensor | None
    text_end: Tensor | None

    def with_integers(self, tensors: dict[str, Tensor | None]) -> "Settings":
        """These settings with other integer tensors, by name."""
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part:
    """One set of keys and values, (B, Hkv, keys, D), and which of them each query sees."""

    key: Tensor
    value: Tensor
    mask: Tensor | None  # bool (B or 1, 1, T or 1, keys); None where every query sees every key
    causal: bool = False  # in place of a mask: as many keys as queries, each sees those up to its own


def split(
    query: Tensor, key: Tensor, value: Tensor, audio_key: Tensor, audio_value: Tensor, settings: Settings
) -> tuple[Tensor, list[Part]]:
    """The queries and the sets of keys: the audio's, if there is any, then the text's.

    Keys and values that no query sees, and queries that see none, may hold NaN: they become zeros.
    """
    num_audio = audio_key.shape[2]
    text_mask, causal = _text_mask(query, key, settings)
    parts = [Part(*_zero_unseen(key, value, text_mask), text_mask, causal)]
    if num_audio:
        audio_mask = _audio_mask(query, key, num_audio, settings)
        index = settings.audio_index
        audio_key, audio_value = shared_rows(audio_key, index), shared_rows(audio_value, index)
        parts.insert(0, Part(*_zero_unseen(audio_key, audio_value, audio_mask), audio_mask))
    masks = [part.mask for part in parts]
    if not causal and all(mask is not None for mask in masks):
        shape = (query.shape[0], 1, query.shape[2])
        blind = torch.stack([(~mask).all(dim=-1).expand(shape) for mask in masks if mask is not None])
        query = query.masked_fill(blind.all(dim=0).unsqueeze(-1), 0)
    return query, parts


def _positions(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    """Key position of each query, int64 (B or 1, 1, T, 1)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    offset: Tensor | int = num_keys - num_queries
    if settings.text_end is not None:
        offset = settings.text_end.to(torch.int64).view(-1, 1, 1, 1) - num_queries
    return offset + torch.arange(num_queries, device=query.device).view(1, 1, -1, 1)


def _text_mask(query: Tensor, key: Tensor, settings: Settings) -> tuple[Tensor | None, bool]:
    """``mask`` and ``causal`` of the text's :class:`Part`."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if settings.text_start is None and settings.text_end is None and settings.window is None:
        if num_queries == 1:
            return None, False
        if num_queries == num_keys and settings.scale >= LEAST_CAUSAL_SCALE:
            return None, True
    position = _positions(query, key, settings)
    index = torch.arange(num_keys, device=query.device)
    mask = index <= position
    if settings.text_start is not None:
        mask = mask & (index >= settings.text_start.view(-1, 1, 1, 1))
    if settings.window is not None:
        mask = mask & (index > position - settings.window)
    return mask, False


def _audio_mask(query: Tensor, key: Tensor, num_audio: int, settings: Settings) -> Tensor | None:
    """``mask`` of the audio's :class:`Part`."""
    mask = None
    if settings.audio_lengths is not None:
        lengths = shared_rows(settings.audio_lengths, settings.audio_index).view(-1, 1, 1, 1)
        mask = torch.arange(num_audio, device=query.device) < lengths
    if settings.audio_visible_from is not None:
        visible = settings.audio_visible_from[:, None, None, :] <= _positions(query, key, settings)
        mask = visible if mask is None else mask & visible
    return mask


def _zero_unseen(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros where no query of the row sees them."""
    if mask is None:
        return key, value
    unseen = ~mask.any(dim=2).unsqueeze(-1)
    return key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)


def shared_rows(tensor: Tensor, index: Tensor | None) -> Tensor:
    """The audio row that each text row reads, (A, ...) -> (B, ...); one row for all is expanded without a copy."""
    if index is None:
        return tensor
    if tensor.shape[0] == 1:
        return tensor.expand(index.shape[0], *tensor.shape[1:])
    return tensor.index_select(0, index)


def sum_shared(grad: Tensor, tensor: Tensor, index: Tensor | None) -> Tensor:
    """The gradient (A, ...) of the audio rows, from the text rows' (B, ...): the derivative of :func:`shared_rows`."""
    if index is None:
        return grad
    if tensor.shape[0] == 1:
        return grad.sum(dim=0, keepdim=True)
    return torch.zeros_like(tensor).index_add_(0, index, grad)
