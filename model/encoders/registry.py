"""Every encoder by the name that configurations have for it."""

from __future__ import annotations

from palkernels.model.encoders.base import Tower
from palkernels.model.encoders.clap import ClapTower
from palkernels.model.encoders.sslam import SslamTower
from palkernels.model.encoders.whisper import WhisperTower

__all__ = ["TOWERS"]

TOWERS: dict[str, type[Tower]] = {"whisper": WhisperTower, "clap": ClapTower, "sslam": SslamTower}
