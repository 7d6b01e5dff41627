"""The packages of the extra `audio`, imported on first use: nothing else in this package needs them."""

from __future__ import annotations

import importlib
from typing import Any

from palkernels.errors import one_line

__all__ = ["import_audio_package"]


def import_audio_package(module: str, user: str) -> Any:
    """Import and return a module such as "torchaudio.transforms".

    Args:
        module: The module's full name.
        user: Who needs it, for the error, such as "load_audio".

    Raises:
        ModuleNotFoundError: The package is missing or broken; the message says what to install, and the cause.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: the package is there and its shared library is not
        package, reason = module.partition(".")[0], one_line(error)
        raise ModuleNotFoundError(
            f"{user} needs {package}: pip install 'palkernels[audio]' ({reason})", name=package
        ) from error
