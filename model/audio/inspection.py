"""What was found out about a file before libsndfile reads it."""

from __future__ import annotations

from dataclasses import dataclass

from palkernels.model.audio.limits import AudioError

__all__ = ["Inspection", "convert_with", "cut_short"]


@dataclass(frozen=True)
class Inspection:
    """A file that may be read, and what is imperfect about it.

    Attributes:
        fault: What the file lacks that its format asks for, in one clause, or None. A recorder that cannot go back
            leaves such files, though they are whole.
        image: The file's bytes with the fault mended, for libsndfile to read in its stead.
        frames: The samples that must come at least, where libsndfile's own count cannot be trusted.
    """

    fault: str | None = None
    image: bytes | None = None
    frames: int | None = None


def cut_short(name: str, reason: str) -> AudioError:
    """Return the error for a file whose end is missing."""
    return AudioError(f"{name} must be whole, got one cut short: {reason}")


def convert_with(ending: str) -> str:
    """Return how to convert a file to one that `load_audio` reads."""
    return f"ffmpeg -i in.{ending} out.wav converts it"
