"""What several commands take as options: a device, a dtype, numbers of tokens."""

from __future__ import annotations

import torch

from palkernels.bench.errors import UserError

__all__ = ["check_counts", "check_text_tokens", "dtype_name", "parse_device", "parse_dtype"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}  # PyTorch's names do too
LARGEST_COUNT = 10**9


def parse_device(name: str) -> torch.device:
    """Return the device that `--device` names.

    Raises:
        UserError: it is no device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:INDEX, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device must exist on this machine, got {name!r} and {torch.cuda.device_count()} GPUs")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype that `--dtype` names, where it is not auto.

    Raises:
        UserError: the name is unknown.
    """
    if name not in DTYPES:
        raise UserError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as results have it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_counts(name: str, counts: tuple[int, ...]) -> None:
    """Check the counts that the option `--NAME` was given.

    Raises:
        UserError: there are none, two are equal, or one is out of bounds.
    """
    if not counts or min(counts) < 1 or max(counts) > LARGEST_COUNT or len(set(counts)) < len(counts):
        got = ", ".join(map(str, counts))
        distinct = "" if len(counts) == 1 else "distinct counts of "
        raise UserError(
            f"--{name.replace('_', '-')} must be {distinct}at least 1 and at most {LARGEST_COUNT}, got {got}"
        )


def check_text_tokens(counts: tuple[int, ...]) -> None:
    """Check the counts that `--text-tokens` was given.

    Raises:
        UserError: they are no counts, or too few for a next token to be predicted.
    """
    check_counts("text_tokens", counts)
    if min(counts) < 2:
        raise UserError(f"--text-tokens must be at least 2 for a next token to be predicted, got {min(counts)}")
