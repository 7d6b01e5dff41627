"""When two answers are the same: letters of either case, and punctuation at the ends of words, do not count."""

from __future__ import annotations

import unicodedata

__all__ = ["normalised", "words"]

MINUS = "-"  # which counts where a digit follows it
KEPT = "%"  # punctuation to Unicode, which means something
APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u02bc\uff07", "'"))  # typographic ones
DASHES = str.maketrans(dict.fromkeys("\u2212\u2013", MINUS))  # a minus, and what stands for one


def normalised(text: str) -> str:
    """Return what of an answer counts: its words, with a blank between two.

    >>> normalised("  It's the  RED one, -3.5 %.")
    "it's the red one -3.5 %"
    """
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Return an answer's words in small letters, in Unicode's form NFKC, without punctuation at their ends.

    What stands within a word stays: "don't", "12:30", "ice-cream". So do a minus before a digit, "%", and symbols such
    as "$". A word that is punctuation alone is none. Articles are words.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().translate(APOSTROPHES).translate(DASHES)
    return [word for word in map(_bare, plain.split()) if word]


def _bare(word: str) -> str:
    """Return a word without the punctuation at its ends."""
    first, last = 0, len(word)
    while first < last and _is_punctuation(word[first]) and not _is_minus(word, first):
        first += 1
    while last > first and _is_punctuation(word[last - 1]):
        last -= 1
    return word[first:last]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P") and character not in KEPT


def _is_minus(word: str, place: int) -> bool:
    return word[place] == MINUS and word[place + 1 : place + 2].isdigit()
