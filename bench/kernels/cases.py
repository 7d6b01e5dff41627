"""What the microbenchmark measures: operations at a model's shapes, their inputs, FLOPs and bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palkernels import audio_kv, lal_attention, quantize_audio_kv
from palkernels.arguments import SCALES
from palkernels.bench.errors import UserError
from palkernels.bench.instruments.rates import Rates
from palkernels.bench.presets import plan_llm
from palkernels.model.causal_lm.layers import head_dim_of

__all__ = ["ALL_OPS", "OPS", "Case", "model_cases", "shape_case"]

OPS = ("forward", "backward", "both", "decode", "audio_kv", "audio_kv_layers")  # what is measured unless asked
DECODE_EIGHT_BITS = "decode_fp8"
ALL_OPS = (*OPS, DECODE_EIGHT_BITS)
GRADIENTS = ("backward", "both")
PROJECTIONS = ("audio_kv", "audio_kv_layers")
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    `backward` and `both` take the gradients of all five tensors. `decode` has one query per text and `text` keys before
    it; `decode_fp8` too, and audio in eight bits. `audio_kv` projects for one layer, with RoPE; `audio_kv_layers` for
    all layers at once.
    """

    op: str
    model: str  # whose shapes these are; "" for other shapes
    batch: int
    heads: int
    kv_heads: int
    text: int
    audio: int
    head_dim: int
    layers: int
    dtype: torch.dtype
    device: torch.device

    @property
    def queries(self) -> int:
        return 1 if self.is_decode else self.text

    @property
    def width(self) -> int:
        """The width of the hidden states, which all query heads have together."""
        return self.heads * self.head_dim

    @property
    def is_decode(self) -> bool:
        return self.op in ("decode", DECODE_EIGHT_BITS)

    @property
    def in_eight_bits(self) -> bool:
        """Whether the audio is."""
        return self.op == DECODE_EIGHT_BITS

    @property
    def is_projection(self) -> bool:
        return self.op in PROJECTIONS

    @property
    def with_gradients(self) -> bool:
        return self.op in GRADIENTS

    @property
    def counts_bytes(self) -> bool:
        """Whether its rate is given in bytes, not in FLOPs, per second."""
        return self.is_decode

    @property
    def flops(self) -> float:
        """FLOPs of matrix products. The backward pass counts five products for the forward's two: the scores again, and
        four gradients."""
        if self.is_projection:
            return 4.0 * self.layers * self.batch * self.audio * self.width * self.kv_heads * self.head_dim
        seen = self.text if self.is_decode else (self.text + 1) / 2  # text keys of a query, on average
        forward = 4.0 * self.batch * self.heads * self.head_dim * self.queries * (self.audio + seen)
        return forward * {"backward": 2.5, "both": 3.5}.get(self.op, 1.0)

    @property
    def bytes(self) -> float:
        """Bytes of each input read once and each output written once. The backward pass moves twice as much as the
        forward."""
        size = self.dtype.itemsize
        if self.is_projection:
            weights = 2 * self.layers * self.kv_heads * self.head_dim * self.width
            results = 2 * self.layers * self.batch * self.audio * self.kv_heads * self.head_dim
            return float(size * (self.batch * self.audio * self.width + weights + results))
        queries = 2 * self.batch * self.queries * self.heads * self.head_dim
        heads = 2 * self.batch * self.kv_heads
        text, audio = (heads * tokens * self.head_dim for tokens in (self.text, self.audio))
        if self.in_eight_bits:
            return float(size * (queries + text) + audio + 4 * heads)
        forward = size * (queries + text + audio) + (
            0 if self.is_decode else 4 * self.batch * self.heads * self.queries
        )
        return float(forward * {"backward": 2, "both": 3}.get(self.op, 1))

    def limit(self, rates: Rates) -> float:
        """Return the least time at these rates, in seconds."""
        return rates.seconds(self.flops, self.bytes)

    def inputs(self, seed: int) -> dict[str, Any]:
        """Return random tensors, contiguous as (B, H, T, D); for a backward pass also the output's gradient."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def floats(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
            return values.mul_(scale).requires_grad_(self.with_gradients)

        if self.is_projection:
            return self._projection_inputs(floats)
        text, audio = ((self.batch, self.kv_heads, n, self.head_dim) for n in (self.text, self.audio))
        queries = (self.batch, self.heads, self.queries, self.head_dim)
        names = ("query", "key", "value", "audio_key", "audio_value")
        tensors = {name: floats(*s) for name, s in zip(names, (queries, text, text, audio, audio), strict=True)}
        if self.in_eight_bits:
            eight_bits = quantize_audio_kv(tensors["audio_key"], tensors["audio_value"])
            return tensors | dict(zip((*names[3:], *SCALES), eight_bits, strict=True))
        return tensors | ({"dout": floats(*queries).detach()} if self.with_gradients else {})

    def _projection_inputs(self, floats: Any) -> dict[str, Any]:
        projected = (self.kv_heads * self.head_dim, self.width)
        angle = torch.arange(self.audio, device=self.device)[:, None] / 10_000 ** (
            torch.arange(0, self.head_dim, 2, device=self.device) / self.head_dim
        )
        angle = torch.cat([angle, angle], dim=-1)
        return {
            "states": floats(self.batch, self.audio, self.width),
            "norm_weight": [floats(self.width) for _ in range(self.layers)],
            "k_weight": [floats(*projected, scale=self.width**-0.5) for _ in range(self.layers)],
            "v_weight": [floats(*projected, scale=self.width**-0.5) for _ in range(self.layers)],
            "cos": angle.cos().to(self.dtype),
            "sin": angle.sin().to(self.dtype),
        }

    def ours(self, inputs: dict[str, Any], impl: str) -> list[Tensor]:
        """Return the outputs of this library's function."""
        if not self.is_projection:
            tensors = {name: x for name, x in inputs.items() if name != "dout"}
            return [lal_attention(**tensors, impl=impl)]
        if self.layers == 1:
            inputs = {name: x[0] if isinstance(x, list) else x for name, x in inputs.items()}
        keys, values = audio_kv(**inputs, num_kv_heads=self.kv_heads, eps=EPS, impl=impl)
        return [*keys, *values] if self.layers > 1 else [keys, values]

    def truth(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Return the outputs, and the gradients if there are any, by their definition in float64."""
        if self.in_eight_bits:
            inputs = {name: x.double() if name in ("query", "key", "value") else x for name, x in inputs.items()}
            return self.ours(inputs, "reference")
        inputs = torch.utils._pytree.tree_map(lambda x: x.detach().double().requires_grad_(x.requires_grad), inputs)
        return self.with_its_gradients(inputs, lambda tensors: self.ours(tensors, "reference"))

    def with_its_gradients(self, inputs: dict[str, Any], run: Any) -> list[Tensor]:
        """Return what `run` returns for the inputs and, where the operation has a backward pass, the five gradients."""
        outputs: list[Tensor] = run(inputs)
        if not self.with_gradients:
            return outputs
        return [*outputs, *self.gradients(outputs, inputs)]

    def gradients(self, outputs: list[Tensor], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs."""
        leaves = [x for name, x in inputs.items() if name != "dout"]
        return torch.autograd.grad(outputs[0], leaves, inputs["dout"], retain_graph=True)

    def smaller(self) -> Case:
        """Return the case with at most two texts: to check results by, where float64 is slow."""
        return dataclasses.replace(self, batch=min(self.batch, 2))


def model_cases(
    model: str, ops: tuple[str, ...], audio: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Case]:
    """Return the cases at a preset's shapes: 128 text tokens, batches as Figure 1 has them, or 1 on a CPU."""
    config = plan_llm(model, None).config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = head_dim_of(config)
    cases = []
    for op in ops:
        batch = 1 if device.type == "cpu" else 12 if op in ("decode", DECODE_EIGHT_BITS) else 8
        layers = config.num_hidden_layers if op == "audio_kv_layers" else 1
        cases += [Case(op, model, batch, heads, kv_heads, 128, n, head_dim, layers, dtype, device) for n in audio]
    return cases


def shape_case(op: str, shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case of a shape given as `B,Hq,Hkv,T,N,D`.

    Raises:
        UserError: the shape is no such six numbers.
    """
    try:
        batch, heads, kv_heads, text, audio, head_dim = (int(part) for part in shape.split(","))
    except ValueError:
        raise UserError(f"--shape must be six whole numbers B,Hq,Hkv,T,N,D, got {shape!r}") from None
    if min(batch, heads, kv_heads, text, audio, head_dim) < 1 or heads % kv_heads or head_dim % 2:
        wanted = "positive numbers with Hq a multiple of Hkv and D even"
        raise UserError(f"--shape must be {wanted}, got {shape!r}")
    layers = 16 if op == "audio_kv_layers" else 1
    return Case(op, "", batch, heads, kv_heads, text, audio, head_dim, layers, dtype, device)
