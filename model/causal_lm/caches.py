"""The cache among the arguments of a call, whose keyword transformers renamed in 5.24."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_KEYWORDS = ("cache", "past_key_values")  # since transformers 5.24, which understands the other too; until 5.23


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among a call's arguments by name, or None. Of two, that which transformers would take."""
    given = (arguments.get(keyword) for keyword in CACHE_KEYWORDS)
    return next((cache for cache in given if cache is not None), None)


def cache_keyword(*functions: Callable[..., Any]) -> str | None:
    """Return the keyword of the cache in the first function that names one, or None where none does."""
    named = ({*inspect.signature(function).parameters} for function in functions)
    return next((keyword for names in named for keyword in CACHE_KEYWORDS if keyword in names), None)
