"""The cache among the arguments of a call, whose keyword transformers renamed in 5.24."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationMixin

# Since transformers 5.24, which understands the other one, too; until 5.23, which hears of no other.
_NEW, _OLD = "cache", "past_key_values"
_RENAMED = _NEW in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_KEYWORDS = (_NEW, _OLD) if _RENAMED else (_OLD,)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among a call's arguments by name, or None.

    Raises:
        ValueError: there are two.
    """
    found = None
    for keyword in CACHE_KEYWORDS:
        cache = arguments.get(keyword)
        if cache is None or cache is found:
            continue
        if found is not None:
            raise ValueError(
                f"a forward with audio must be given one cache, got {' and '.join(CACHE_KEYWORDS)}: somebody adds one "
                "(peft's prompt learning does)"
            )
        found = cache
    return found


def prepared_whole(prepare: Callable[..., dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Return what ``prepare`` makes of a step's arguments by name; all of the text where it drops the cache.

    Phi-3 does so where its frequencies change. Some versions of transformers then leave the last token alone.
    """
    arguments = prepare(**given)
    if given.get("next_sequence_length") is None or cache_of(given) is None or cache_of(arguments) is not None:
        return arguments
    return prepare(**without_cache(given))


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's arguments by name for all of its text, without the cache."""
    dropped = {*CACHE_KEYWORDS, "next_sequence_length"}
    return {name: None if name in dropped else argument for name, argument in given.items()}


def cache_keyword(*functions: Callable[..., Any]) -> str | None:
    """Return the keyword of the cache in the first function that names one, or None where none does."""
    named = ({*inspect.signature(function).parameters} for function in functions)
    return next((keyword for names in named for keyword in CACHE_KEYWORDS if keyword in names), None)
