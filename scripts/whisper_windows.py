"""Measure how far Whisper's states in a short window are from those of the same clips in its window of 30 s, and how
long the encoder takes.

    python scripts/whisper_windows.py CHECKPOINT [--output bench/results/whisper-windows.json]

CHECKPOINT is a directory that WhisperTower reads. The clips are words and sentences spoken by espeak-ng, from the
package espeakng-loader, and stretches of the bundled clip, so every run hears the same. A clip's valid states are
compared one by one. Clips that a window does not hold are left out of its rows: they would be cut.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palkernels.bench.clip import bundled_clip
from palkernels.bench.machine import cpu_name, package_version
from palkernels.bench.study.sounds.espeak import Speaker
from palkernels.model import WhisperTower, load_audio
from palkernels.model.audio.resampling import resample

RATE = 16_000
WINDOWS = (3, 5, 10, 30)
VOICES = ("en-us+m3", "en+f3", "en-gb-scotland+m7", "en-us+f5")
WORDS = ("red", "seven", "purple", "window", "bird", "orange")
SENTENCES = (
    "Which word is spoken here?",
    "The old boat lies under the bridge.",
    "A small bird sings before it rains.",
)
LONG = "Please put the heavy box beside the warm chair, and bring me the yellow book and a clean bottle of cold water."
REPEATS = 5


def spoken() -> dict[str, list[Tensor]]:
    """Return clips (samples,) at 16 kHz, by kind."""
    texts = {"words": WORDS, "sentences": SENTENCES, "long sentences": (LONG,)}
    with Speaker() as speaker:
        return {
            kind: [
                resample(torch.from_numpy(speaker.speak(text, voice)).float(), speaker.rate, RATE)
                for text in of_kind
                for voice in VOICES
            ]
            for kind, of_kind in texts.items()
        }


def compared(short: WhisperTower, whole: WhisperTower, clips: list[Tensor]) -> dict[str, float]:
    """Return cosines and relative distances of the clips' valid states in two windows."""
    cosines, distances = [], []
    for clip in clips:
        (a, length), (b, _) = short.features([clip]), whole.features([clip])
        n = int(length[0])
        states, expected = short(a)[0, :n], whole(b)[0, :n]
        cosines.append(torch.cosine_similarity(states, expected, dim=-1).mean().item())
        distances.append(((states - expected).norm() / expected.norm()).item())
    return {
        "mean_cosine": statistics.mean(cosines),
        "least_cosine": min(cosines),  # of a clip's mean
        "mean_distance": statistics.mean(distances),
    }


def seconds(tower: WhisperTower, clip: Tensor) -> float:
    """Return the encoder's median seconds on one core for a clip, of several."""
    features, _ = tower.features([clip])
    times = []
    for _ in range(1 + REPEATS):
        start = time.process_time()
        tower(features)
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", default="Whisper tiny.en")
    parser.add_argument("--output", type=Path, default=Path("bench/results/whisper-windows.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    bundled = load_audio(bundled_clip(), RATE)
    kinds = spoken() | {"bundled clip, 3 s of it": list(bundled.split(3 * RATE))}
    rows: list[dict[str, Any]] = []
    whole = WhisperTower.from_checkpoint(options.checkpoint)
    with torch.inference_mode():
        for window in WINDOWS:
            tower = WhisperTower.from_checkpoint(options.checkpoint, window_seconds=window)
            fitting = {
                kind: clips
                for kind, clips in kinds.items()
                if max(clip.numel() for clip in clips) <= tower.features.max_samples
            }
            taken = seconds(tower, kinds["words"][0])
            for kind, clips in fitting.items():
                longest = max(clip.numel() for clip in clips) / RATE
                row = {"window_seconds": window, "clips": kind, "count": len(clips), "longest_seconds": longest}
                rows.append(row | compared(tower, whole, clips) | {"encoder_seconds": taken})
    versions = {name: package_version(name) for name in ("torch", "transformers", "espeakng-loader")}
    meta = {"encoder": options.name, "cpu": cpu_name(), "threads": 1, "python": platform.python_version()} | versions
    options.output.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
