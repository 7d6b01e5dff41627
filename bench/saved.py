"""A saved audio LLM, as commands are given one by --model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from palkernels.bench.errors import UserError, one_line
from palkernels.model import PalForConditionalGeneration, PalProcessor

__all__ = ["load_saved"]


def load_saved(directory: Path, device: torch.device) -> tuple[Any, Any]:
    """Return a saved model, for inference, and its processor.

    Raises:
        UserError: the directory holds no audio LLM.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"--model must be a directory with a saved model, got {str(directory)!r}")
    logging.disable_progress_bar()
    try:
        model = PalForConditionalGeneration.from_pretrained(directory, local_files_only=True).to(device).eval()
        processor = PalProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"--model must be a saved audio LLM, got {one_line(error)}") from error
    return model, processor
