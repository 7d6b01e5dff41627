"""Datasets with an Audio column, as the package ``datasets`` holds, saves and publishes them.

A column is the clip's by its feature, ``Audio``, or by its name; the others by their names (schemas.py):

    audio       an Audio column, or "audio", "audios"
    question    "question", "instruction", "prompt", "query"; without one, ``Source.question`` is asked of every clip
    answer      "answer", "output", "response", "transcription", "transcript", "sentence", "text", "caption", "label";
                a ClassLabel's name is the answer, and all of its names are the choices
    task, choices
    messages    or "conversations": a whole conversation, the clips in the place of its marks

``Source.columns`` names them otherwise. Clips are read from the dataset's files when they are needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palkernels.errors import one_line
from palkernels.model.data.conversations import conversation, located, text_of
from palkernels.model.data.reasons import NO_ANSWER, RejectedError
from palkernels.model.data.sample import Message, Sample
from palkernels.model.data.schemas import Schema, check, parts_of, split_fault
from palkernels.model.data.sources import Source

__all__ = ["StoredClip", "rows"]


class StoredClip(Mapping[str, Any]):
    """A clip in a dataset's file, {"bytes": ...}, which is read when it is asked for.

    Args:
        dataset: The dataset, its Audio columns not decoded.
        row: Its row.
        column: Its column.
        item: Which of the clips of a column with several; None: it has one.
    """

    def __init__(self, dataset: Any, row: int, column: str, item: int | None = None) -> None:
        self.dataset = dataset
        self.row = row
        self.column = column
        self.item = item

    def __getitem__(self, key: str) -> Any:
        if key != "bytes":
            raise KeyError(key)
        cell = self.dataset[self.row][self.column]
        return (cell if self.item is None else cell[self.item])["bytes"]

    def __iter__(self) -> Iterator[str]:
        return iter(("bytes",))

    def __len__(self) -> int:
        return 1


def rows(source: Source) -> Iterator[tuple[str, Sample | RejectedError]]:
    """Yield where each row of a dataset stands, counted from 0 as the dataset does, and its sample or what is wrong.

    Raises:
        ValueError: The dataset lacks a column that is needed, or its files are none.
        ModuleNotFoundError: The package ``datasets`` is missing.
    """
    datasets = _import_datasets()
    dataset = _opened(datasets, source)
    clips_in = [name for name, feature in dataset.features.items() if _audio_feature(datasets, feature)]
    columns, faults = parts_of(Schema(dataset.column_names, clips_in), source)
    check(source, faults)
    dataset, listed = _undecoded(datasets, dataset, columns["audio"])
    labels = getattr(dataset.features.get(columns.get("answer", "")), "names", None)  # a ClassLabel's
    folder = Path(source.folder) if source.folder is not None else _folder_of(source.path)
    for number, record in enumerate(dataset):
        where = f"{source.name}:row {number}"
        try:
            cell = record[columns["audio"]]
            cells = list(cell or []) if listed else [cell]
            clips = [
                StoredClip(dataset, number, columns["audio"], item if listed else None)
                if isinstance(one, Mapping) and isinstance(one.get("bytes"), bytes)
                else located(one, folder)
                for item, one in enumerate(cells)
            ]
            yield where, _sample(record, columns, clips, labels, source, where)
        except RejectedError as rejected:
            yield where, rejected


def _sample(
    record: Mapping[str, Any],
    columns: Mapping[str, str],
    clips: list[Any],
    labels: Sequence[str] | None,
    source: Source,
    where: str,
) -> Sample:
    """Return the sample of one row."""
    values = {name: record[column] for name, column in columns.items() if name != "audio"}
    if "messages" in columns:
        fields = {columns["messages"]: values["messages"], "audios": clips, "system": record.get("system")}
        kind = "messages" if _has_roles(values["messages"]) else "conversations"
        renamed = {kind: fields.pop(columns["messages"]), **fields}
        return conversation(
            renamed | {name: values.get(name) for name in ("task", "choices")}, Path(), where, source.task
        )
    answer, choices = values["answer"], values.get("choices")
    if labels is not None and isinstance(answer, int):
        answer, choices = labels[answer] if 0 <= answer < len(labels) else None, list(labels)
    if answer is None or not text_of(answer, "answer").strip():
        raise RejectedError(NO_ANSWER, "answer must say something, got an empty answer")
    asked = text_of(values["question"], "question") if "question" in values else source.question
    parts: list[Message] = [{"type": "audio", "audio": clip} for clip in clips]
    parts += [{"type": "text", "text": asked}] if asked else []
    return Sample(
        ({"role": "user", "content": parts}, {"role": "assistant", "content": answer}),
        where,
        text_of(values.get("task") or source.task, "task"),
        tuple(text_of(choice, "a choice") for choice in choices or ()),
    )


def _has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and any(isinstance(turn, Mapping) and "role" in turn for turn in turns)


def _import_datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        message = "reading datasets, their saved directories and parquet files needs datasets: pip install datasets"
        raise ModuleNotFoundError(message, name="datasets") from error
    return datasets


def _opened(datasets: Any, source: Source) -> Any:
    """Return a source's dataset: itself, one that was saved to a directory, or parquet files."""
    dataset = source.path
    if isinstance(dataset, str | os.PathLike):
        path = Path(dataset)
        shards = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
        saved = path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
        try:
            dataset = datasets.load_from_disk(str(path)) if saved else datasets.Dataset.from_parquet(shards)
        except Exception as error:  # of pyarrow's many
            got = one_line(error, with_type=True)
            raise ValueError(f"{path.name} must be a saved dataset or parquet files, got {got}: {path}") from error
    splits = list(dataset) if isinstance(dataset, datasets.DatasetDict) else None
    fault = split_fault(splits, source)
    check(source, [fault] if fault is not None else [])
    if splits is not None:
        dataset = dataset[source.split or splits[0]]
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"path must be a file, a directory or a datasets.Dataset, got {type(dataset).__name__}")
    return dataset.with_format(None)


def _audio_feature(datasets: Any, feature: Any) -> bool:
    """Return whether a column holds clips, one or a list of them, by its feature."""
    return isinstance(feature, datasets.Audio) or isinstance(getattr(feature, "feature", None), datasets.Audio)


def _undecoded(datasets: Any, dataset: Any, column: str) -> tuple[Any, bool]:
    """Return the dataset with a column's clips not decoded, and whether a cell holds a list of them."""
    feature = dataset.features[column]
    listed = not isinstance(feature, datasets.Audio | dict | datasets.Value)
    if _audio_feature(datasets, feature):
        plain = datasets.Audio(decode=False)
        dataset = dataset.cast_column(column, type(feature)(plain) if listed else plain)
    return dataset, listed


def _folder_of(path: Any) -> Path:
    """Return where a dataset's relative paths start: a file's folder, a saved dataset itself, else where we are."""
    if not isinstance(path, str | os.PathLike):
        return Path()
    return Path(path) if Path(path).is_dir() else Path(path).parent
