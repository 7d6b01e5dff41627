"""Files and datasets in the forms that people have, read into one form, with a list of what could not be.

samples = read("calls.jsonl", max_seconds=30)
samples[0]                    # a Sample
print(samples.summary())      # 9,812 samples of 9,840; dropped: 20 too long, 8 audio missing
samples.dropped[0]            # Dropped("calls.jsonl:17", "too long", "calls.jsonl:17: audio file ... must be ...")
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palkernels.model.data import columns
from palkernels.model.data.clips import LengthsOfClips
from palkernels.model.data.conversations import conversation
from palkernels.model.data.openaqa import question
from palkernels.model.data.reasons import RejectedError
from palkernels.model.data.records import records_of
from palkernels.model.data.sample import Sample
from palkernels.model.data.samples import Dropped, Samples
from palkernels.model.data.schemas import check, is_dataset, unfit
from palkernels.model.data.sources import Source

__all__ = ["read"]


def read(
    source: Source | str | os.PathLike[str], *, max_seconds: float | None = None, progress: bool = False
) -> Samples:
    """Read a source, and look at the header of every clip, which is not decoded yet.

    A row that gives no sample is dropped and listed: no JSON object, malformed, without an answer, with more or fewer
    clips than it marks, or with a clip that is missing, unreadable or too long. Nothing is cut.

    Args:
        source: What to read; a path is a :class:`Source` of that path.
        max_seconds: The longest clip; None: any.
        progress: Whether to show how far it is, where the output is a terminal.

    Raises:
        ValueError: The file is missing, of none of the formats, or has no row that gives a sample.
        ModuleNotFoundError: A dataset needs ``datasets``, or clips need soundfile.
    """
    source = source if isinstance(source, Source) else Source(source)
    samples: list[Sample] = []
    dropped: list[Dropped] = []
    for place, row in _rows(source):
        if isinstance(row, Sample):
            samples.append(row)
        else:
            dropped.append(Dropped(place, row.reason, f"{place}: {row}"))
    lengths = LengthsOfClips()
    lengths.look_at([clip for sample in samples for clip in sample.clips()], progress=progress)
    result = Samples.sifted(samples, lambda sample: lengths.unfit(sample.clips(), max_seconds), dropped, lengths)
    if not len(result):
        got = f"{result.summary()}: {result.dropped[0].detail}" if result.dropped else "an empty file"
        raise ValueError(f"{source.name} must hold at least one row that gives a sample, got {got}")
    return result


def _rows(source: Source) -> Iterator[tuple[str, Sample | RejectedError]]:
    """Yield where each row of a source stands, and its sample or what is wrong with it."""
    format = _format_of(source)
    if format == "columns":
        yield from columns.rows(source)
        return
    path = Path(source.path)
    folder = path.parent if source.folder is None else Path(source.folder)
    to_sample = question if format == "openaqa" else conversation
    for place, value in records_of(path):
        where = f"{source.name}:{place}"
        if isinstance(value, RejectedError):
            yield where, value
            continue
        try:
            yield where, to_sample(value, folder, where, source.task)
        except RejectedError as rejected:
            yield where, rejected


def _format_of(source: Source) -> str:
    """Return the format of a source, told by its path and rows where the source does not say."""
    if isinstance(source.path, str | os.PathLike) and not Path(source.path).exists():
        raise ValueError(f"path must exist, got no such file: {source.path}")
    if not isinstance(source.path, str | os.PathLike) and not is_dataset(source):
        raise ValueError(f"path must be a file for format {source.format!r}, got {type(source.path).__name__}")
    check(source, unfit(source))
    if is_dataset(source):
        return "columns"
    if source.format != "auto":
        return source.format
    path = Path(source.path)
    first: dict[str, Any] | None = None
    for _, record in records_of(path):
        if isinstance(record, RejectedError):
            continue
        if "messages" in record or "conversations" in record:
            return "messages"
        if "instruction" in record and "audio_id" in record:
            return "openaqa"
        first = record if first is None else first
    if first is None:
        return "messages"  # of which there is none, as reading says
    keys = ", ".join(sorted(map(repr, first))) or "no keys"
    raise ValueError(
        f"{path.name} must hold messages (or conversations), or OpenAQA's instruction and audio_id, got {keys}"
    )
