"""Why a row gives no sample: what it is counted under, and the exception that says so."""

from __future__ import annotations

__all__ = [
    "AUDIO_COUNT",
    "AUDIO_MISSING",
    "MALFORMED",
    "NOT_JSON",
    "NO_ANSWER",
    "TOO_LONG",
    "TOO_MANY_TOKENS",
    "UNREADABLE",
    "RejectedError",
]

NOT_JSON = "not a JSON object"
MALFORMED = "malformed"  # a value is missing, or of another type
NO_ANSWER = "no answer"
AUDIO_COUNT = "audio count"  # more or fewer clips than the texts mark
AUDIO_MISSING = "audio missing"
UNREADABLE = "audio unreadable"
TOO_LONG = "too long"  # a clip, in seconds
TOO_MANY_TOKENS = "too many tokens"


class RejectedError(ValueError):
    """A row or clip that gives no sample.

    Args:
        reason: What it is counted under.
        detail: What is wrong with it, in one line.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail
