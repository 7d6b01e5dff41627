"""Launch every kernel on a GPU a few times, checked against float64: for bench/gpu.sh, by itself and under sanitizers.

    python scripts/launches.py
    TRITON_INTERPRET=1 python scripts/launches.py --device cpu --cases 1     # without a GPU; float16 and float32 alone

Sizes are small, since a sanitizer slows a kernel down by orders of magnitude, and odd, since whole tiles hide faults.
"""

import argparse
import itertools
import sys

import torch

from palkernels import audio_kv, lal_attention
from palkernels.testing import FEATURES, lal_case, max_error

CASES = [
    (torch.bfloat16, 64, ()),
    (torch.bfloat16, 128, ("lengths", "index", "text_start", "text_end")),
    (torch.float16, 80, FEATURES),
    (torch.bfloat16, 256, ("visible_from", "window")),
    (torch.float32, 64, FEATURES),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", help="[default: cuda]")
    parser.add_argument("--cases", type=int, default=len(CASES), help="the last so many  [default: all]")
    options = parser.parse_args()
    attention_launches(options.device, CASES[-options.cases :])
    audio_kv_launches(options.device)


def attention_launches(device: str, cases: list[tuple[torch.dtype, int, tuple[str, ...]]]) -> None:
    """Output and gradients of ``lal_attention``, for 37 queries and for 2, which decode."""
    for seed, (queries, (dtype, dim, features)) in enumerate(itertools.product((37, 2), cases)):  # 2: decoding
        case = lal_case(
            batch=2, heads=6, kv_heads=2, queries=queries, keys=53, audio=131, dim=dim, features=features, audio_rows=2,
            dtype=dtype, seed=seed,
        )  # fmt: skip
        results = []
        for impl, place, inputs in (("triton", device, case), ("reference", "cpu", case.to(torch.float64))):
            leaves = [x.detach().to(place).requires_grad_() for x in inputs.tensors]
            options = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in inputs.options.items()}
            out = lal_attention(*leaves, **options, impl=impl)
            dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
            grads = torch.autograd.grad(out, leaves, dout.to(place, out.dtype))
            results.append([x.cpu() for x in (out, *grads)])
        worst = max(
            max_error(got, want) / max(1.0, want.abs().max().item()) for got, want in zip(*results, strict=True)
        )
        print(f"{case.name} {dtype}: largest error {worst:.2g}, relative to the largest value", flush=True)
        if not worst <= 16 * torch.finfo(dtype).eps:
            sys.exit(f"the error must be at most {16 * torch.finfo(dtype).eps:.2g}, got {worst:.2g}")


def audio_kv_launches(device: str) -> None:
    """Keys, values and gradients of ``audio_kv`` for one layer, and keys and values for two at once."""
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    layer = {
        "states": floats(2, 37, 72), "norm_weight": floats(72), "k_weight": floats(2 * 24, 72),
        "v_weight": floats(2 * 24, 72), "k_bias": floats(2 * 24), "k_norm_weight": floats(24),
    }  # fmt: skip
    rope = {"cos": floats(2, 37, 16), "sin": floats(2, 37, 16)}
    results = []
    for impl, place, dtype in (("triton", device, torch.float32), ("reference", "cpu", torch.float64)):
        leaves = {name: x.to(place, dtype).requires_grad_() for name, x in layer.items()}
        arguments = leaves | {name: x.to(place, dtype) for name, x in rope.items()}
        key_value = audio_kv(**arguments, num_kv_heads=2, eps=1e-5, impl=impl)
        grads = torch.autograd.grad(key_value, list(leaves.values()), [torch.ones_like(x) for x in key_value])
        in_lists = {name: x if name == "states" else [x, x] for name, x in arguments.items()}
        with torch.no_grad():
            keys, values = audio_kv(**in_lists, num_kv_heads=2, eps=1e-5, impl=impl)
        results.append([x.detach().cpu() for x in (*key_value, *grads, *keys, *values)])
    worst = max(max_error(got, want) / want.abs().max().item() for got, want in zip(*results, strict=True))
    print(f"audio_kv: largest error {worst:.2g}, relative to the largest value", flush=True)
    if not worst <= 1e-4:  # PyTorch's products may sum in another order
        sys.exit(f"the error must be at most 1e-4, got {worst:.2g}")


if __name__ == "__main__":
    main()
