"""Which releases of vLLM the plugin is written for. It uses parts that vLLM promises nobody, so the range is narrow."""

import re
from typing import Any

__all__ = ["SUPPORTED", "is_supported"]

SUPPORTED = "0.32"  # a minor release: its fixes are taken, its successor is not


def is_supported(version: str) -> bool:
    """Return whether a version of vLLM is one that the plugin is written for."""
    return re.match(rf"{re.escape(SUPPORTED)}(\.|$|[^\d])", version) is not None


def __getattr__(name: str) -> Any:
    """Raise where vLLM asks for the model's class: its release is another one."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm

    raise ImportError(
        f"vllm must be {SUPPORTED}.* to serve audio LLMs, got {vllm.__version__}: pip install 'palkernels[vllm]'"
    )
