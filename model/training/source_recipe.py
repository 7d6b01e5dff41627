"""The part of a recipe that says where samples come from: files and datasets, and what is what in them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from palkernels.errors import one_line
from palkernels.model.data.schemas import NAMES, faults
from palkernels.model.data.sources import FORMATS, Source
from palkernels.model.training import fields as take
from palkernels.model.training.fields import Fields
from palkernels.model.training.located import Located, RecipeError, compose, placed

__all__ = ["SourceRecipe", "read_sources", "sources_of_words"]


@dataclass(frozen=True)
class SourceRecipe:
    """Rows of one file or folder, as :class:`Source` has them; None: not said. ``name`` is what stages call it, and
    several may share one."""

    path: str
    name: str
    format: str = "auto"
    weight: float = 1.0
    task: str = ""
    folder: str | None = None
    columns: Mapping[str, str] | None = field(default=None, hash=False)
    question: str | None = None
    split: str | None = None

    def source(self) -> Source:
        """Return what :func:`palkernels.model.data.read` takes."""
        columns, question = self.columns or {}, self.question or ""
        return Source(self.path, self.format, self.weight, self.task, self.folder, columns, question, self.split)


FIELDS = tuple(SourceRecipe.__dataclass_fields__)
OF_HELD_OUT = tuple(name for name in FIELDS if name != "weight")  # each of them is asked once
OF_WORDS = tuple(name for name in OF_HELD_OUT if name != "name")


def read_sources(data: Fields, name: str, found: list[str]) -> tuple[SourceRecipe, ...]:
    """Return a list of files, or of all lists of a mapping, whose keys are then their names."""
    if not data.has(name):
        return ()
    tree, known = data.items[name], FIELDS if name == "train" else OF_HELD_OUT
    if isinstance(tree.value, dict) and "path" not in tree.value:
        groups = [(f"{data.path}.{name}.{key}", key, value) for key, value in tree.value.items()]
    else:
        groups = [(f"{data.path}.{name}", "", tree)]
    sources = []
    for path, group, value in groups:
        listed = isinstance(value.value, list)
        for i, item in enumerate(take.items(value)):
            source = _source(item, f"{path}.{i}" if listed else path, group, known, found)
            if source is not None:
                sources.append(source)
    return tuple(sources)


def sources_of_words(words: Sequence[str], folder: Path) -> list[Source]:
    """Return the sources that a command is given: paths, and mappings such as "{path: speech, split: test}".

    Args:
        words: The words.
        folder: What paths are relative to.

    Raises:
        RecipeError: All that is wrong with them.
    """
    found: list[str] = []
    sources = []
    for word in words:
        tree = Located(word, word, folder)
        if word.startswith("{"):
            try:
                tree = placed(compose(word, "", folder), word)
            except RecipeError as error:
                found.append(
                    f"{word}: must be YAML, in which texts with ?, : or commas are quoted, got {one_line(error)}"
                )
                continue
        sources.append(_source(tree, "", "", OF_WORDS, found))
    if found:
        raise RecipeError(found)
    return [source.source() for source in sources if source is not None]


def _source(item: Located, path: str, group: str, known: Collection[str], found: list[str]) -> SourceRecipe | None:
    if not isinstance(item.value, dict):
        item = Located({"path": item}, item.place, item.folder)
    entry = Fields(item, path, found, known)
    before = len(found)
    where = entry.read("path", take.text)
    if where is None:
        return None
    written = take.path(item.value["path"], where)
    if not os.path.exists(written):
        entry.wrong("path", f"must be a file or a folder that is there, got {where!r}, which is not at {written!r}")
    source = SourceRecipe(
        written,
        entry.read("name", take.text, group or Path(written).name.split(".")[0]),
        entry.read("format", take.choice(*FORMATS), "auto"),
        entry.read("weight", take.number(0, above=True), 1.0),
        entry.read("task", take.text, ""),
        entry.read("folder", _folder, None),
        _columns(entry, found),
        entry.read("question", _said, None),
        entry.read("split", take.text, None),
    )
    if len(found) == before:
        for fault in faults(source.source()):
            entry.wrong(fault.field, fault.message)
    return source


def _columns(entry: Fields, found: list[str]) -> dict[str, str] | None:
    """Return which column is which part of a sample."""
    if not entry.has("columns"):
        return None
    columns = Fields(entry.items["columns"], entry.named("columns"), found, tuple(NAMES))
    return {name: columns.read(name, take.text) for name in columns.items}


def _folder(value: Located) -> str:
    return take.path(value, take.text(value))


def _said(value: Located) -> str:
    said = take.text(value)
    if not said.strip():
        raise ValueError("must say something, got an empty text")
    return said
