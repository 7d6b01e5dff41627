"""What a source's files say of themselves before any row is read: which column is which part of a sample, which splits
there are, and what of a :class:`Source` does not fit.

A column is the clip's by its feature, ``Audio``, or by its name; the others by their names, :data:`NAMES`.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from palkernels.errors import one_line
from palkernels.model.data.sources import Source

__all__ = [
    "JSON_SUFFIXES",
    "NAMES",
    "Fault",
    "Schema",
    "check",
    "faults",
    "is_dataset",
    "parts_of",
    "split_fault",
    "unfit",
]

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
OF_DATASETS = ("columns", "question", "split")  # what a Source says of a dataset alone
NAMES = {
    "audio": ("audio", "audios"),
    "question": ("question", "instruction", "prompt", "query"),
    "answer": (
        "answer", "output", "response", "transcription", "transcript", "sentence", "text", "caption", "label",
    ),
    "task": ("task",),
    "choices": ("choices",),
    "messages": ("messages", "conversations"),
}  # fmt: skip


class Fault(NamedTuple):
    """What is wrong with a field of a source: "must be ..., got ..."."""

    field: str
    message: str


@dataclass(frozen=True)
class Schema:
    """The columns of a dataset, and those of them that hold clips by their feature."""

    columns: Sequence[str]
    audio: Sequence[str]


def is_dataset(source: Source) -> bool:
    """Return whether a source is a dataset with columns, not a file of JSON, as far as its path tells."""
    if source.format != "auto" or not isinstance(source.path, str | os.PathLike):
        return source.format in ("auto", "columns")
    return Path(source.path).is_dir() or Path(source.path).suffix == ".parquet"


def faults(source: Source) -> list[Fault]:
    """Return all that is wrong with a source whose path is there, by what its files say without their rows."""
    found = unfit(source)
    if found or not is_dataset(source):
        return found
    if importlib.util.find_spec("datasets") is None:
        return [Fault("path", "must be of JSON rows where datasets is not installed: pip install datasets")]
    path = Path(source.path)
    try:
        splits = _splits(path)
        wrong = split_fault(splits, source)
        if wrong is not None:
            return [wrong]
        chosen = None if splits is None else source.split or splits[0]
        schema = _schema(path if chosen is None else path / chosen)
    except Exception as error:  # a damaged file makes JSON's and pyarrow's readers raise anything
        return [Fault("path", f"must be a saved dataset or parquet files, got {one_line(error, with_type=True)}")]
    return parts_of(schema, source)[1]


def check(source: Source, found: Sequence[Fault]) -> None:
    """Raise a ValueError with all that is wrong with a source, if anything is."""
    if found:
        said = [f"{source.name if fault.field == 'path' else fault.field} {fault.message}" for fault in found]
        raise ValueError("; ".join(said))


def split_fault(splits: Sequence[str] | None, source: Source) -> Fault | None:
    """Return what is wrong with a source's split where a dataset has these; None: it is of one piece."""
    if splits is None:
        got = source.split
        return None if got is None else Fault("split", f"must not be given for a dataset without splits, got {got!r}")
    if source.split in splits or (source.split is None and len(splits) == 1):
        return None
    got = "nothing" if source.split is None else repr(source.split)
    return Fault("split", f"must be one of {', '.join(sorted(splits))}, got {got}")


def parts_of(schema: Schema, source: Source) -> tuple[dict[str, str], list[Fault]]:
    """Return the column of each part of a sample that a dataset has, and what is wrong with a source's ``columns``."""
    found = []
    if unknown := sorted(set(source.columns) - set(NAMES)):
        found.append(Fault("columns", f"must be of {', '.join(NAMES)}, got {', '.join(unknown)}"))
    there = list(schema.columns)
    columns = dict(source.columns)
    if missing := sorted(set(columns.values()) - set(there)):
        found.append(Fault("columns", f"must be among {', '.join(there)}, got {', '.join(missing)}"))
    if "audio" not in columns and len(schema.audio) == 1:
        columns["audio"] = schema.audio[0]
    for part, names in NAMES.items():
        candidates = [name for name in names if name in there and name not in columns.values()]
        if part not in columns and candidates:
            columns[part] = candidates[0]
    needed = {"audio": "audio" in columns, "answer": "answer" in columns or "messages" in columns}
    needed["question"] = "question" in columns or "messages" in columns or bool(source.question)
    if absent := [part for part, is_there in needed.items() if not is_there]:
        otherwise = ", or question asks every clip the same" if "question" in absent else ""
        message = f"must have a column for {', '.join(absent)}, which columns names{otherwise}, got {', '.join(there)}"
        found.append(Fault("path", message))
    return columns, found


def unfit(source: Source) -> list[Fault]:
    """Return what does not fit the kind of file that a source is, a dataset or rows of JSON."""
    found = []
    if source.folder is not None and not Path(source.folder).is_dir():
        found.append(Fault("folder", f"must be a folder that is there, got {os.fspath(source.folder)!r}"))
    if is_dataset(source):
        return found
    for name in OF_DATASETS:
        if value := getattr(source, name):
            message = f"must be given for a dataset alone, as rows of JSON name their parts, got {value!r}"
            found.append(Fault(name, message))
    path = Path(source.path)
    if path.is_dir():
        found.append(Fault("format", f"must be auto or columns for a folder, got {source.format!r}"))
    elif source.format == "auto" and path.suffix not in JSON_SUFFIXES:
        endings = ", ".join((*JSON_SUFFIXES, ".parquet"))
        message = f"must end with {endings} or be a saved dataset where format is auto, got {path.name!r}"
        found.append(Fault("path", message))
    return found


def _splits(path: Path) -> list[str] | None:
    """Return the splits of a saved ``DatasetDict``; None: it is none."""
    file = path / "dataset_dict.json"
    return list(json.loads(file.read_text(encoding="utf-8"))["splits"]) if file.exists() else None


def _schema(path: Path) -> Schema:
    """Return the columns of a saved dataset or of parquet files."""
    if (path / "state.json").exists():
        features = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))["features"]
        return Schema(list(features), [name for name, feature in features.items() if _is_audio(feature)])
    shards = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not shards:
        raise ValueError("neither in it")
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(shards[0])
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    return Schema(schema.names, [name for name in schema.names if _is_audio(features.get(name))])


def _is_audio(feature: Any) -> bool:
    """Return whether a feature, as JSON has it, is of clips: one or a list of them."""
    if isinstance(feature, Mapping) and "feature" in feature:
        feature = feature["feature"]
    if isinstance(feature, list) and feature:
        feature = feature[0]
    return isinstance(feature, Mapping) and feature.get("_type") == "Audio"
