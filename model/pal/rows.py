"""Texts as rows of ids: with placeholders, cut to a length, padded, and with what is learned of them marked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy
import torch
from torch import Tensor

from palkernels.model.audio.limits import AudioError
from palkernels.model.audio.waveforms import check_rank
from palkernels.model.pal.options import Options

__all__ = [
    "IGNORED",
    "Row",
    "Span",
    "arrays",
    "clips_of_texts",
    "cut",
    "distinct",
    "ends_of_texts",
    "expand",
    "is_list",
    "pad",
    "read_row",
    "table",
]

IGNORED = -100  # a label that the loss passes over
Span = tuple[int, int | None]  # characters of a text, from the first to before the last; None: to its very end


@dataclass(frozen=True)
class Row:
    """A text's ids."""

    ids: list[int]
    marked: list[bool]  # of each id, whether it is in a span
    begin: int = 0  # how many ids the tokenizer put before and behind the text
    end: int = 0
    places: tuple[int, ...] = ()  # where each clip stands
    counts: tuple[int, ...] = ()  # how many placeholders it has there


def read_row(tokenizer: Any, text: str, options: Options, spans: Sequence[Span] = ()) -> Row:
    """Return a text's ids; one that begins with the BOS token gets no other.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        options: whether special tokens are added, and whether it may be cut, for which their number is read.
        spans: what to mark. A token that is partly inside is marked. What the tokenizer puts behind the text belongs to
            a span that reaches the very end.

    Raises:
        ValueError: the tokenizer cannot say which characters its tokens come from.
    """
    bos = tokenizer.bos_token
    add = options.add_special_tokens and not (bos and text.startswith(bos))
    if spans and not tokenizer.is_fast:
        raise ValueError(
            "the tokenizer must know its tokens' characters to mark what is learned, as fast ones do, "
            f"got {type(tokenizer).__name__}"
        )
    found = tokenizer(text, add_special_tokens=add, return_special_tokens_mask=True, return_offsets_mapping=bool(spans))
    ids, added = found["input_ids"], found["special_tokens_mask"]
    begin = next((i for i, special in enumerate(added) if not special), len(added)) if add else 0
    end = next((i for i, special in enumerate(added[begin:][::-1]) if not special), 0) if add else 0
    marked = [False] * len(ids)
    for first, last in spans:
        for i, (start, stop) in enumerate(found["offset_mapping"]):
            marked[i] |= start < stop and first < stop and (last is None or start < last)
        if last is None:
            marked[len(ids) - end :] = [True] * end
    return Row(ids, marked, begin, end)


def expand(row: Row, audio_token_id: int, counts: Sequence[int]) -> Row:
    """Return the row with each audio token replaced by its ``counts`` placeholders, which are never marked."""
    ids: list[int] = []
    marked: list[bool] = []
    places: list[int] = []
    for token, is_marked in zip(row.ids, row.marked, strict=True):
        count = 1
        if token == audio_token_id:
            count = counts[len(places)]
            places.append(len(ids))
            is_marked = False
        ids += [token] * count
        marked += [is_marked] * count
    return replace(row, ids=ids, marked=marked, places=tuple(places), counts=tuple(counts))


def cut(row: Row, max_length: int, side: str, number: int) -> Row:
    """Return the row cut to ``max_length`` ids, without its text's end ("right") or beginning ("left").

    What the tokenizer has put around the text stays.

    Args:
        row: an expanded row.
        max_length: the most ids.
        side: where text is cut off, as ``tokenizer.truncation_side`` says.
        number: of the text, for the error.

    Raises:
        ValueError: a clip would be cut.
    """
    surplus = len(row.ids) - max_length
    if surplus <= 0:
        return row
    stop = len(row.ids) - row.end
    first, last = (row.begin, row.begin + surplus) if side == "left" else (stop - surplus, stop)
    clips = [(place, place + count) for place, count in zip(row.places, row.counts, strict=True)]
    is_cut = any(end > first if side == "right" else start < last for start, end in clips)
    if is_cut or surplus > stop - row.begin:
        raise ValueError(
            f"truncation must cut text alone, never a clip, got max_length {max_length} for text {number} of "
            f"{len(row.ids)} tokens, with clips at {', '.join(f'{start} to {end}' for start, end in clips) or 'none'}"
        )
    moved = surplus if side == "left" else 0
    return replace(
        row,
        ids=row.ids[:first] + row.ids[last:],
        marked=row.marked[:first] + row.marked[last:],
        places=tuple(place - moved for place in row.places),
    )


def pad(tokenizer: Any, rows: Sequence[Row], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention mask and marks (B, T) of rows.

    Raises:
        ValueError: the rows are not of one length and must not be padded, or one is longer than all must be.
    """
    lengths = [len(row.ids) for row in rows]
    if options.padding is False and len(set(lengths)) > 1:
        raise ValueError(f"padding must be True for texts of different lengths, got False for {lengths} tokens")
    if options.padding == "max_length" and max(lengths) > (options.max_length or 0):
        raise ValueError(
            f"max_length must be at least {max(lengths)}, the tokens of the longest text with its placeholders, "
            f"or truncation be True, got {options.max_length}"
        )
    padded = tokenizer.pad(
        {"input_ids": [row.ids for row in rows]},
        padding=options.padding,
        max_length=options.max_length if options.padding == "max_length" else None,
        pad_to_multiple_of=options.pad_to_multiple_of,
        padding_side=options.padding_side,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = padded["attention_mask"]
    marks = torch.zeros_like(mask, dtype=torch.bool)
    marks[mask.bool()] = torch.tensor([is_marked for row in rows for is_marked in row.marked], dtype=torch.bool)
    return padded["input_ids"], mask, marks


def table(of_texts: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Return the numbers of each text as (B, K), filled up to the longest list, K at least 1."""
    longest = max(1, *map(len, of_texts))
    return torch.tensor([[*numbers, *[filler] * (longest - len(numbers))] for numbers in of_texts])


def arrays(data: Any) -> Any:
    """Return tensors as NumPy arrays, in dicts and lists as they are."""
    if isinstance(data, dict):
        return {name: arrays(value) for name, value in data.items()}
    return [arrays(value) for value in data] if isinstance(data, list) else data.numpy()


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether a caller's value is several, as lists, tuples and the columns of ``datasets`` are."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def ends_of_texts(begins: Any, texts: Sequence[str]) -> list[list[Span]]:
    """Return a span of each text, from where ``labels_from`` says that its labels begin.

    Raises:
        ValueError: there are more or fewer positions than texts, or one is not in its text.
    """
    positions: list[Any] = list(begins) if is_list(begins) else [begins] * len(texts)
    fits = len(positions) == len(texts) and all(
        isinstance(position, Integral) and not isinstance(position, bool) and int(position) in range(len(text) + 1)
        for position, text in zip(positions, texts, strict=True)
    )
    if not fits:
        raise ValueError(f"labels_from must be a position in each of {len(texts)} texts, in characters, got {begins!r}")
    return [[(int(position), None)] for position in positions]


def checked_clips(audio: Any) -> list[Any]:
    """Return a caller's clip or clips as a list of clips, or of lists of them, after checking what each is.

    Raises:
        AudioError: in the place of a clip there is a number, as in a list of samples or in an array's pair with its
            rate, or an array of several clips or channels.
    """
    clips = [list(item) if is_list(item) else item for item in audio] if is_list(audio) else [audio]
    for several in (clips, *(item for item in clips if isinstance(item, list))):
        for clip in several:
            if isinstance(clip, numpy.ndarray | Tensor):
                check_rank(clip)
        numbers = [isinstance(clip, Real) for clip in several] if is_list(audio) else []
        if any(numbers) and all(numbers):
            raise AudioError("audio must be a NumPy array, a tensor or a path, got a list of numbers")
        if any(numbers):
            raise AudioError(
                'audio must be a dict {"array": ..., "sampling_rate": ...}, or an array beside sampling_rate=, got an '
                "array and its rate as a pair"
            )
    return clips


def clips_of_texts(audio: Any, counts: list[int], audio_token: str) -> list[list[Any]]:
    """Return the clips of each text.

    Args:
        audio: a caller's clips, in a list for each text or not; None: there are none.
        counts: how many audio tokens each text has.
        audio_token: what the error calls them.

    Raises:
        AudioError: what is given is no clip.
        ValueError: there are more or fewer clips than audio tokens.
    """
    clips = [] if audio is None else checked_clips(audio)
    by_text = bool(clips) and all(isinstance(of_text, list) for of_text in clips)
    got: Any = [len(of_text) for of_text in clips] if by_text else len(clips)
    expected: Any = counts if by_text else sum(counts)
    if got != expected:
        raise ValueError(f"audio must hold a clip for each {audio_token} in the text, {expected}, got {got}")
    if by_text:
        return clips
    remaining = iter(clips)
    return [[next(remaining) for _ in range(count)] for count in counts]


def distinct(clips_by_text: list[list[Any]]) -> tuple[list[Any], list[list[int]]]:
    """Return every clip once, and the clips of each text by number."""
    clips: list[Any] = []
    numbers: dict[Any, int] = {}
    index: list[list[int]] = []
    for clips_of_text in clips_by_text:
        index.append([])
        for clip in clips_of_text:
            key = os.fspath(clip) if isinstance(clip, str | os.PathLike) else id(clip)
            if key not in numbers:
                numbers[key] = len(clips)
                clips.append(clip)
            index[-1].append(numbers[key])
    return clips, index
