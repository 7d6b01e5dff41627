"""What transformers' Auto classes find under the model type "pal" before the audio LLM is loaded.

AutoConfig looks a saved model up by its model type, AutoProcessor by the name of its processor's class. Both get an
empty class of the right name, which loads :mod:`palkernels.model.pal` for anything that is asked of it. Importing that
room registers its own classes, so that AutoModel then knows the class of the config that AutoConfig has loaded.
"""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoProcessor

__all__ = ["register"]


class StandIn(type):
    """Classes that pass whatever is asked of them on to the class of the same name in :mod:`palkernels.model.pal`."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(_loaded(cls), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _loaded(cls)(*args, **kwargs)


class PalConfig(metaclass=StandIn):
    """Stands in for :class:`palkernels.model.PalConfig`."""


class PalProcessor(metaclass=StandIn):
    """Stands in for :class:`palkernels.model.PalProcessor`."""


def _loaded(stand_in: type) -> Any:
    return getattr(import_module("palkernels.model.pal"), stand_in.__name__)


def register() -> None:
    """Make the stand-ins known to AutoConfig and AutoProcessor."""
    AutoConfig.register("pal", PalConfig)
    AutoProcessor.register(PalConfig, PalProcessor)
