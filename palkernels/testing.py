"""Inputs and error measures for tests of attention implementations."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from palkernels import reference

FEATURES = ("lengths", "index", "visible_from", "text_start", "text_end", "window", "softcap", "scale")


@dataclass(frozen=True)
class LalCase:
    """One call of ``lal_attention``: ``lal_attention(*case.tensors, **case.options)``."""

    name: str  # such as B3-Hq4-Hkv2-T7-S9-N31-D24-window
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "LalCase":
        """The case with its numbers in another dtype, detached."""
        return self._with(tensor.detach().to(dtype) for tensor in self.tensors)

    def requires_grad(self) -> "LalCase":
        """The case with fresh leaves that need gradients, of the same strides."""
        return self._with(tensor.detach().requires_grad_() for tensor in self.tensors)

    def _with(self, tensors: Iterable[Tensor]) -> "LalCase":
        return replace(self, tensors=tuple(tensors))  # type: ignore[arg-type]


def lal_case(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    audio: int,
    dim: int,
    features: Iterable[str] = (),
    audio_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    poison: bool = False,
) -> LalCase:
    """Random tensors and, for each feature, random but valid options.

    With ``poison``, every tensor is a view with odd strides into a parent filled with NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    choose = random.Random(seed)
    features = tuple(features)
    rows = batch if audio_rows is None or "index" not in features else audio_rows

    def floats(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
        if not poison:
            return values
        *outer, rows, columns = shape
        layout = choose.choice(["rows", "columns", "every other"])
        step = 2 if layout == "every other" else 1
        sizes = [size + 3 for size in outer] + [rows + 3, columns * step + 3]
        if layout == "columns":
            sizes[-2:] = sizes[:-3:-1]
        parent = torch.full(sizes, float("nan"), dtype=dtype, device=device)
        parent = parent.transpose(-1, -2) if layout == "columns" else parent
        last = slice(1, 1 + columns * step, step)
        view = parent[(*(slice(1, 1 + size) for size in (*outer, rows)), last)]
        return view.copy_(values)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        kind = choose.choice([torch.int32, torch.int64, torch.int16])
        return torch.randint(low, high + 1, shape, generator=generator).to(device=device, dtype=kind)

    options: dict[str, Any] = {}
    if "lengths" in features:
        options["audio_lengths"] = integers(0, audio, rows)
    if "index" in features:
        options["audio_index"] = integers(0, rows - 1, batch)
    if "visible_from" in features:
        options["audio_visible_from"] = integers(0, keys + 1, batch, audio)
    if "text_start" in features:
        options["text_start"] = integers(0, keys + 2, batch)
    if "text_end" in features:
        options["text_end"] = integers(queries, keys, batch)
    if "window" in features:
        options["window"] = choose.randint(1, keys + 2)
    if "softcap" in features:
        options["softcap"] = choose.choice([2.0, 30.0])
    if "scale" in features:
        options["scale"] = choose.choice([0.05, 0.7])
    shapes = [
        (batch, heads, queries, dim),
        *[(batch, kv_heads, keys, dim)] * 2,
        *[(rows, kv_heads, audio, dim)] * 2,
    ]
    name = f"B{batch}-Hq{heads}-Hkv{kv_heads}-T{queries}-S{keys}-A{rows}-N{audio}-D{dim}-seed{seed}"
    query, key, value, audio_key, audio_value = (floats(*shape) for shape in shapes)
    return LalCase("-".join([name, *features]), (query, key, value, audio_key, audio_value), options)


def unreachable(case: LalCase) -> tuple[Tensor, Tensor]:
    """Two bool masks: which text keys (B, S) and which audio tokens (A, N) no query sees."""
    query, key, _, audio_key, _ = case.tensors
    options = case.options
    index = options.get("audio_index", torch.arange(query.shape[0], device=query.device)).long()
    lengths = options.get("audio_lengths")
    mask = reference.lal_mask(
        query.shape[0],
        query.shape[2],
        key.shape[2],
        audio_key.shape[2],
        audio_lengths=None if lengths is None else lengths[index],
        audio_visible_from=options.get("audio_visible_from"),
        text_start=options.get("text_start"),
        text_end=options.get("text_end"),
        window=options.get("window"),
        device=query.device,
    )
    seen = mask.any(dim=1)
    audio_seen = torch.zeros(audio_key.shape[0], audio_key.shape[2], dtype=torch.long, device=query.device)
    audio_seen.index_add_(0, index, seen[:, : audio_key.shape[2]].long())
    return ~seen[:, audio_key.shape[2] :], audio_seen == 0


def fill_unreachable(case: LalCase, value: float) -> LalCase:
    """The case with ``value`` in every key and value that no query sees."""
    text, audio = (unseen[:, None, :, None] for unseen in unreachable(case))
    query, key, value_, audio_key, audio_value = case.tensors
    filled_text = (tensor.masked_fill(text, value) for tensor in (key, value_))
    filled_audio = (tensor.masked_fill(audio, value) for tensor in (audio_key, audio_value))
    return case._with((query, *filled_text, *filled_audio))


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference in float64; positions where both are the same infinity count as equal."""
    if actual.shape != expected.shape:
        raise ValueError(f"actual must have expected's shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return float(difference.max()) if difference.numel() else 0.0
