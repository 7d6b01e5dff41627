"""A small set of launches of every kernel on a GPU, checked against float64: what bench/gpu.sh --sanitize watches.

Sizes are small, since a sanitizer slows a kernel down by orders of magnitude, and odd, since whole tiles hide faults.
"""

import itertools
import sys

import torch

from palkernels import lal_attention
from palkernels.testing import FEATURES, lal_case, max_error

CASES = [
    (torch.bfloat16, 64, ()),
    (torch.bfloat16, 128, ("lengths", "index", "text_start", "text_end")),
    (torch.float16, 80, FEATURES),
    (torch.bfloat16, 256, ("visible_from", "window")),
    (torch.float32, 64, FEATURES),
]


def main() -> None:
    for seed, (queries, (dtype, dim, features)) in enumerate(itertools.product((37, 2), CASES)):  # 2: decoding
        case = lal_case(
            batch=2, heads=6, kv_heads=2, queries=queries, keys=53, audio=131, dim=dim, features=features, audio_rows=2,
            dtype=dtype, seed=seed,
        )  # fmt: skip
        results = []
        for impl, device, inputs in (("triton", "cuda", case), ("reference", "cpu", case.to(torch.float64))):
            leaves = [x.detach().to(device).requires_grad_() for x in inputs.tensors]
            options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.options.items()}
            out = lal_attention(*leaves, **options, impl=impl)
            dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
            grads = torch.autograd.grad(out, leaves, dout.to(device, out.dtype))
            results.append([x.cpu() for x in (out, *grads)])
        worst = max(
            max_error(got, want) / max(1.0, want.abs().max().item()) for got, want in zip(*results, strict=True)
        )
        print(f"{case.name} {dtype}: largest error {worst:.2g}, relative to the largest value", flush=True)
        if not worst <= 16 * torch.finfo(dtype).eps:
            sys.exit(f"the error must be at most {16 * torch.finfo(dtype).eps:.2g}, got {worst:.2g}")


if __name__ == "__main__":
    main()
