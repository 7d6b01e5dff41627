"""YAML whose every value knows where it stands, so that what is wrong with it can be said with file and line.

A plain 1e-3 is a number here, as in YAML 1.2; `yes`, `no`, `on` and `off` are texts. Dates are texts, too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from palkernels.errors import one_line

__all__ = ["Located", "RecipeError", "compose", "did_you_mean", "override", "placed"]

NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d*([eE][-+]?\d+)?")
WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
PLAIN = {"True": True, "False": False, "None": None}  # as Python prints them
KINDS = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, each fault with its place and what to do."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


@dataclass
class Located:
    """A value of a recipe, and its place.

    Attributes:
        value: A scalar, a list of Located, or a dict of Located by key.
        place: As a fault names it: "recipe.yaml:12", or an override as it was given.
        folder: What its paths are relative to.
    """

    value: Any
    place: str
    folder: Path

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {name: item.plain() for name, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value

    def kind(self) -> str:
        """Return what an error calls the value."""
        if isinstance(self.value, dict | list):
            return KINDS[type(self.value)]
        return "nothing" if self.value is None else repr(self.value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ": did you mean X?" where a known name is near to one that is not; else what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {near[0]!r}?" if near else f": it may be {', '.join(names)}"


def compose(text: str, name: str, folder: Path) -> Located:
    """Return a YAML text with places.

    Args:
        text: The text.
        name: What places call it.
        folder: What its paths are relative to.

    Raises:
        RecipeError: It is no YAML, holds a key twice or holds itself.
    """
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError([f"{place}: the file must be YAML, got: {said}"]) from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{name}: the file must be YAML, got: {one_line(error)}"]) from error
    if node is None:
        return Located({}, f"{name}:1", folder)
    faults: list[str] = []
    tree = _located(node, name, folder, faults, ())
    if faults:
        raise RecipeError(faults)
    return tree


def _located(node: Any, name: str, folder: Path, faults: list[str], above: tuple[int, ...]) -> Located:
    place = f"{name}:{node.start_mark.line + 1}" if name else ""
    if id(node) in above:
        faults.append(f"{place}: a value must not hold itself: an alias names what it stands in")
        return Located(None, place, folder)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(item, name, folder, faults, above) for item in node.value], place, folder)
    if not isinstance(node, yaml.MappingNode):
        return Located(_scalar(node.value) if node.style is None else node.value, place, folder)
    items: dict[str, Located] = {}
    for key_node, value_node in node.value:
        key_place = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            faults.append(f"{key_place}: a key must be a text, got a list or a mapping")
            continue
        if key_node.value in items:
            faults.append(f"{key_place}: {key_node.value!r} must be given once, got it again")
            continue
        item = _located(value_node, name, folder, faults, above)
        items[key_node.value] = Located(item.value, key_place, folder)
    return Located(items, place, folder)


def _scalar(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    if text in PLAIN:
        return PLAIN[text]
    if not any(character.isdigit() for character in text) or not NUMBER.fullmatch(text):
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:  # "e1" has all that a number is made of
        return text


def override(tree: Located, words: Sequence[str], folder: Path, rivals: Collection[str] = ()) -> list[str]:
    """Put values into a recipe that the command line gives, as in "stages.0.lr=1e-4"; returns what is wrong with them.

    A path goes through keys and numbers of a list's items, or their names: "stages.align.lr=1e-4". Keys that are not
    there are made; items are not.

    Args:
        tree: The recipe, which is changed.
        words: The overrides.
        folder: What paths in them are relative to.
        rivals: Keys of which a mapping has one: an override takes the place of another that the recipe has.
    """
    faults: list[str] = []
    for word in words:
        path, equals, text = word.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            faults.append(f"{word}: an override must be KEY=VALUE, with dots in a deeper key, got {word!r}")
            continue
        try:
            value = compose(text, "", folder) if text.strip() else Located(None, "", folder)
        except RecipeError:
            faults.append(f"{word}: the value must be YAML, got {text!r}")
            continue
        fault = _put(tree, keys, placed(value, word), rivals, words)
        if fault:
            faults.append(f"{word}: {fault}")
    return faults


def placed(tree: Located, place: str) -> Located:
    """Give a value, and all that it holds, one place, and return it."""
    tree.place = place
    value = tree.value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        placed(item, place)
    return tree


def _put(
    tree: Located, keys: Sequence[str], value: Located, rivals: Collection[str], words: Sequence[str]
) -> str | None:
    here = tree
    for i, key in enumerate(keys):
        last, so_far = i + 1 == len(keys), ".".join(keys[:i]) or "the recipe"
        if here.value is None:
            here.value, here.place = {}, value.place
        if isinstance(here.value, dict):
            if last:
                for other in rivals if key in rivals else ():
                    if other in here.value and here.value[other].place not in words:
                        del here.value[other]
                here.value[key] = value
                return None
            here = here.value.setdefault(key, Located({}, value.place, value.folder))
        elif isinstance(here.value, list):
            number = _number(here.value, key)
            if number is None:
                known = [*filter(None, map(_name, here.value)), *map(str, range(len(here.value)))]
                return f"{so_far} must have an item {key!r}{did_you_mean(key, known)}"
            if last:
                here.value[number] = value
                return None
            here = here.value[number]
        else:
            return f"{so_far} must be a mapping or a list to have {key!r}, got {here.kind()}"
    return None


def _number(items: list[Located], key: str) -> int | None:
    """Return which item of a list a key means: by number, or by the item's name."""
    if key.isdecimal():
        return int(key) if int(key) < len(items) else None
    names = [_name(item) for item in items]
    return names.index(key) if key in names else None


def _name(item: Located) -> str | None:
    """Return the name of a list's item, if it has one."""
    name = item.value["name"].value if isinstance(item.value, dict) and "name" in item.value else None
    return name if isinstance(name, str) else None
