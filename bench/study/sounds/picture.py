"""One example of every task as a spectrogram, with its question and answer.

`python -m palkernels.bench.study.sounds.picture FOLDER PICTURE.png` draws a folder that `folder.make` made.
"""

from __future__ import annotations

import io
import json
import sys
import textwrap
import wave
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.report.document import write_all
from palkernels.bench.report.style import grid
from palkernels.bench.study.sounds.folder import MANIFEST
from palkernels.bench.study.sounds.signals import RATE, Signal

__all__ = ["sheet"]

COLUMNS = 3
WINDOW, HOP = 400, 160  # samples: 25 ms every 10 ms
RANGE = 60.0  # dB shown below the loudest
COLORS = 16  # so few that the picture stays small
PAUSE = 0.15  # seconds between clips of one question


def sheet(folder: Path) -> bytes:
    """Return a PNG with the first test question of each task in a folder.

    Raises:
        UserError: The folder holds no finished sounds.
    """
    try:
        tasks = json.loads((folder / MANIFEST).read_bytes())["settings"]["tasks"]
        examples = [_first(folder / task) for task in tasks]
    except (OSError, ValueError, KeyError, wave.Error) as error:
        raise UserError(f"{str(folder)!r} must be a folder of finished sounds, got {one_line(error)}") from error
    lines = -(-len(tasks) // COLUMNS)
    figure, axes = grid(lines, COLUMNS, (4.2 * COLUMNS, 2.5 * lines))
    for ax in axes.flat[len(examples) :]:
        ax.set_visible(False)
    for ax, (line, clips) in zip(axes.flat, examples, strict=False):
        _panel(ax, line, clips)
    figure.tight_layout(h_pad=1.5)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=80)
    return png.getvalue()


def _first(folder: Path) -> tuple[dict[str, Any], list[Signal]]:
    """Return the first test question of a task, and its clips."""
    with (folder / "test.jsonl").open(encoding="utf-8") as file:
        line: dict[str, Any] = json.loads(file.readline())
    clips = []
    for name in line["audios"]:
        with wave.open(str(folder / name), "rb") as clip:
            clips.append(np.frombuffer(clip.readframes(clip.getnframes()), "<i2") / 32768)
    return line, clips


def _panel(ax: Axes, line: dict[str, Any], clips: list[Signal]) -> None:
    powers = [_decibels(clip) for clip in clips]
    top = max(power.max() for power in powers)
    start = 0.0
    for clip, power in zip(clips, powers, strict=True):
        end = start + len(clip) / RATE
        extent = (start, end, 0.0, RATE / 2000)
        look: dict[str, Any] = {
            "origin": "lower",
            "aspect": "auto",
            "interpolation": "nearest",
            "cmap": colormaps["magma"].resampled(COLORS),
        }
        ax.imshow(power, extent=extent, vmin=top - RANGE, vmax=top, **look)
        start = end + PAUSE
    ax.set_xlim(0, start - PAUSE)
    question, answer = (message["content"] for message in line["messages"])
    asked = textwrap.fill(question.replace("<audio>", ""), 52)
    ax.set_title(f"{asked}\n{answer}", fontsize=9, parse_math=False)
    ax.set_xlabel("seconds", fontsize=8)
    ax.set_ylabel(f"{line['task']}\nkHz", fontsize=8)
    ax.tick_params(labelsize=7)


def _decibels(clip: Signal) -> Signal:
    """Return a clip's power in dB, (frequencies, frames)."""
    frames = np.lib.stride_tricks.sliding_window_view(clip, WINDOW)[::HOP] * np.hanning(WINDOW)
    return 20 * np.log10(np.abs(np.fft.rfft(frames, axis=-1)).T + 1e-6)


def main(arguments: list[str]) -> int:
    """Draw a folder into a file: `FOLDER PICTURE.png`. Returns the exit code."""
    if len(arguments) != 2:
        print("error: two paths must be given: FOLDER PICTURE.png", file=sys.stderr)
        return 2
    folder, target = map(Path, arguments)
    try:
        write_all(target.parent, {target.name: sheet(folder)})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
