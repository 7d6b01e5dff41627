"""A language model and its tokenizer from a directory, from the hub, or from a .gguf file."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_accelerate_available, is_gguf_available

from palkernels.errors import one_line

__all__ = ["checked_dtype", "load_language_model"]

NAMES_LISTED = 3  # names that an error spells out
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
CONFIG = "config.json"


def load_language_model(llm: str | os.PathLike[str], dtype: torch.dtype | str | None = None) -> tuple[Any, Any]:
    """Return a causal LM with the weights of a checkpoint, on the CPU, and its tokenizer.

    Args:
        llm: a directory as transformers' ``save_pretrained`` writes it, with the tokenizer's files; the name of such a
            model on the hub, which transformers downloads; or a .gguf file, whose blocks are unpacked.
        dtype: of the weights, or its name; None: the checkpoint's, which for a .gguf file is float32.

    Raises:
        ValueError: there is no such model, a weight of it is missing, it is quantised otherwise than by GGUF, or it is
            no causal LM.
        ImportError: a package that it needs is not installed.
    """
    source, name = os.fspath(llm), f"llm {os.fspath(llm)!r}"
    settings: dict[str, Any] = {"trust_remote_code": False, **_source_settings(Path(source), name)}
    wanted = checked_dtype(dtype)
    with_weights = {"dtype": "auto" if wanted is None else wanted, "output_loading_info": True}
    if "gguf_file" in settings:
        source = str(Path(source).parent)
        with_weights["quantization_config"] = GgufConfig(dequantize=True)
    try:
        if "gguf_file" not in settings:
            quantised = getattr(AutoConfig.from_pretrained(source, **settings), "quantization_config", None)
            if quantised is not None:
                raise ValueError(f"weights that are quantised by {_method(quantised)!r}, which must be plain ones")
        tokenizer = AutoTokenizer.from_pretrained(source, **settings)
        model, info = AutoModelForCausalLM.from_pretrained(source, **settings, **with_weights)
    except ImportError as error:
        raise ImportError(f"{name} must be read with all that it needs installed, got {one_line(error)}") from error
    except Exception as error:  # a damaged or missing file makes transformers and its readers raise anything
        whose = "with its tokenizer" if settings.get("local_files_only") else "that the hub has, or a directory"
        raise ValueError(f"{name} must be a causal LM {whose}, got {one_line(error, with_type=True)}") from error
    if info["missing_keys"]:
        first = ", ".join(map(repr, sorted(info["missing_keys"])[:NAMES_LISTED]))
        raise ValueError(
            f"{name} must hold every weight of a {type(model).__name__}, got {len(info['missing_keys'])} missing, "
            f"the first {first}"
        )
    if "gguf_file" in settings and isinstance(model.config.eos_token_id, int):
        # transformers 5.17 gives SmolLM2's tokenizer another one than the file names.
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    if settings.get("local_files_only"):
        model.config._name_or_path = Path(llm).name  # what is saved says nothing of this machine's folders
    return model, tokenizer


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that weights are asked to have; None: that of their checkpoint.

    Raises:
        ValueError: it is no floating dtype, or no name of one.
    """
    wanted = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
    return wanted


def _source_settings(path: Path, name: str) -> dict[str, Any]:
    """Return what transformers must be told of where a model lies: in a .gguf file, in a directory, on the hub."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{name} must be a file, got {'a directory' if path.exists() else 'nothing there'}")
        if missing := [
            package
            for package, there in (("gguf", is_gguf_available()), ("accelerate", is_accelerate_available()))
            if not there
        ]:
            raise ImportError(f"{name} must be read with gguf and accelerate: pip install {' '.join(missing)}")
        return {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        model_type = _model_type(path, name)
        if model_type == "pal":
            raise ValueError(f"{name} must be a language model alone, got a whole audio LLM")
        return {"local_files_only": True}
    # A name on the hub is NAME or OWNER/NAME.
    if path.exists() or path.is_absolute() or len(path.parts) > 2 or ".." in path.parts:
        got = "a file" if path.exists() else "none there"
        raise ValueError(f"{name} must be a directory, a .gguf file or a name on the hub, got {got}")
    return {}


def _model_type(directory: Path, name: str) -> Any:
    """Return the model type in a directory's config.json."""
    try:
        return json.loads((directory / CONFIG).read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError as error:
        files = sorted(path.name for path in directory.iterdir())
        gguf = [file for file in files if file.endswith(".gguf")]
        advice = f": {str(directory / gguf[0])!r} names a .gguf file" if gguf else ""
        listed = ", ".join(files[:NAMES_LISTED]) + (", ..." if len(files) > NAMES_LISTED else "") or "no files"
        raise ValueError(f"{name} must hold a config.json, got {listed}{advice}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{name} must hold a config.json with a model_type, got {one_line(error, with_type=True)}"
        ) from error


def _method(quantised: Any) -> Any:
    """Return the name of a quantisation, whose config is a dict or an object."""
    return quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
