"""Every method by its name, in the order of tables and legends. A new method is one class and one entry here."""

from __future__ import annotations

from palkernels.bench.methods.base import Method
from palkernels.bench.methods.flamingo import Flamingo
from palkernels.bench.methods.lal import Lal, LalEager
from palkernels.bench.methods.levers import LalCheckpoint, LalFusedLoss, LalRecompute
from palkernels.bench.methods.pal import PalMulti, PalUnified
from palkernels.bench.methods.plits import Plits, PlitsPooled, PlitsTuned

__all__ = ["DEFAULT_METHODS", "LEVERS", "METHODS"]

_CLASSES: tuple[type[Method], ...] = (
    Plits,
    PlitsTuned,
    PlitsPooled,
    LalEager,
    Lal,
    PalMulti,
    PalUnified,
    Flamingo,
    LalRecompute,
    LalCheckpoint,
    LalFusedLoss,
)
METHODS: dict[str, Method] = {method.name: method() for method in _CLASSES}
DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if method.in_figure1)
LEVERS = tuple(name for name, method in METHODS.items() if method.is_lever)
