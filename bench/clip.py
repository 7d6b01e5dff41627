"""The audio clip that comes with the package, for runs that need some sound and are given none."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["bundled_clip"]


def bundled_clip() -> Path:
    """Return the path of the bundled clip: 12 s, 16 kHz, mono, 16-bit FLAC, made by scripts/make_clip.py (CC0-1.0).

    Raises:
        FileNotFoundError: The installed package lacks it.
    """
    clip = Path(str(files("palkernels.bench").joinpath("assets", "clip.flac")))
    if not clip.is_file():
        raise FileNotFoundError(f"the bundled clip must be at {str(clip)!r}, got no such file: reinstall palkernels")
    return clip
