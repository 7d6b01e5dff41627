"""Reading a mapping of a recipe key by key, with all that is wrong collected."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from palkernels.model.training.located import Located, did_you_mean

__all__ = [
    "REQUIRED",
    "Fields",
    "boolean",
    "choice",
    "count",
    "items",
    "number",
    "path",
    "path_or_name",
    "text",
    "texts",
]

Value = TypeVar("Value")
Check = Callable[[Located], Value]  # raises ValueError("must be ..., got ...")
REQUIRED: Any = object()


class Fields:
    """The keys of one mapping.

    Args:
        tree: The mapping.
        path: What faults call it, as in "stages.0"; "": the recipe itself.
        faults: To which each fault is added.
        known: The keys that it may have; None: any.
    """

    def __init__(self, tree: Located, path: str, faults: list[str], known: Collection[str] | None) -> None:
        self.tree, self.path, self.faults = tree, path, faults
        self.items: dict[str, Located] = tree.value if isinstance(tree.value, dict) else {}
        if not isinstance(tree.value, dict):
            self.fault(tree, f"{path or 'the recipe'} must be a mapping, got {tree.kind()}")
        for name, item in self.items.items():
            if known is not None and name not in known:
                self.fault(item, f"{self.named(name)} is not known{did_you_mean(name, known)}")

    def named(self, name: str) -> str:
        """Return a key as faults call it."""
        return f"{self.path}.{name}" if self.path else name

    def fault(self, where: Located, message: str) -> None:
        """Add what is wrong with a value."""
        self.faults.append(f"{where.place}: {message}")

    def wrong(self, name: str, message: str) -> None:
        """Add what is wrong with a key's value, or with the mapping where it has no such key."""
        self.fault(self.items.get(name, self.tree), f"{self.named(name)} {message}")

    def has(self, name: str) -> bool:
        """Return whether a key is there and says something."""
        return name in self.items and self.items[name].value is not None

    def read(self, name: str, check: Check[Value], default: Any = REQUIRED) -> Value:
        """Return a key's value by its check, or the default where it is not there or wrong."""
        if not self.has(name):
            if default is REQUIRED:
                self.wrong(name, "must be given, got nothing")
            return None if default is REQUIRED else default  # type: ignore[return-value]
        try:
            return check(self.items[name])
        except ValueError as error:
            self.wrong(name, str(error))
            return None if default is REQUIRED else default  # type: ignore[return-value]


def text(value: Located) -> str:
    """Take a text; a number is one, too."""
    if isinstance(value.value, bool | dict | list) or value.value is None:
        raise ValueError(f"must be a text, got {value.kind()}")
    return str(value.value)


def texts(value: Located) -> tuple[str, ...]:
    """Take a text, or a list of them."""
    return tuple(map(text, value.value)) if isinstance(value.value, list) else (text(value),)


def boolean(value: Located) -> bool:
    """Take true or false."""
    if not isinstance(value.value, bool):
        raise ValueError(f"must be true or false, got {value.kind()}")
    return value.value


def number(low: float, high: float = float("inf"), *, above: bool = False) -> Check[float]:
    """Return a check for a number from ``low``, or above it, to ``high``."""
    bounds = (f"above {low:g}" if above else f"at least {low:g}") + (
        "" if high == float("inf") else f", at most {high:g}"
    )

    def check(value: Located) -> float:
        got = value.value
        if isinstance(got, bool) or not isinstance(got, int | float):
            raise ValueError(f"must be a number {bounds}, got {value.kind()}")
        if not (low < got if above else low <= got) or not got <= high:
            raise ValueError(f"must be a number {bounds}, got {got}")
        return float(got)

    return check


def count(low: int) -> Check[int]:
    """Return a check for an integer from ``low`` on."""

    def check(value: Located) -> int:
        got = value.value
        whole = isinstance(got, float) and got.is_integer()  # 5e3
        if isinstance(got, bool) or not (isinstance(got, int) or whole) or got < low:
            raise ValueError(f"must be a whole number, at least {low}, got {value.kind()}")
        return int(got)

    return check


def choice(*names: str) -> Check[str]:
    """Return a check for one of several names."""

    def check(value: Located) -> str:
        if value.value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, got {value.kind()}")
        return str(value.value)

    return check


def items(value: Located) -> list[Located]:
    """Take a list, or one value as a list of it."""
    return value.value if isinstance(value.value, list) else [value]


def path(value: Located, written: str) -> str:
    """Return a path absolute, which is relative to where it is written."""
    return os.path.abspath(value.folder / Path(written).expanduser())


def path_or_name(value: Located) -> str:
    """Take a path, relative to where it is written, that is there; else a name of a hub, as it is.

    A name of a hub is OWNER/NAME or NAME, and does not end as a file does.
    """
    written = text(value)
    where = path(value, written)
    if os.path.exists(where):
        return where
    if (
        written.startswith((".", "/", "~"))
        or written.count("/") > 1
        or written.endswith((".gguf", ".safetensors", ".pt"))
    ):
        raise ValueError(f"must be a file or a directory that is there, got {written!r}, which is not at {where!r}")
    return written
