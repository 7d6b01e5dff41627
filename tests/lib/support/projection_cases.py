"""Arguments of audio_kv, its results with all gradients, and how they are compared."""

import torch

from palkernels import audio_kv
from palkernels.testing import max_error

FEATURES = ("k_bias", "v_bias", "k_norm_weight", "rope", "partial_rope", "rope_per_row", "norm_offset")
EVERYTHING = ("k_bias", "v_bias", "k_norm_weight", "rope_per_row", "norm_offset")


def arguments(
    *features, rows=2, tokens=37, width=24, heads=2, dim=10, dtype=torch.float32, device="cpu", seed=0, poison=False
):
    """Tensors as leaves that need gradients, by name, cos and sin without; and the numbers."""
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape, needs=True):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        if poison:  # every other element of a larger tensor that is NaN elsewhere
            parent = torch.full([2 * size + 2 for size in shape], float("nan"), dtype=dtype, device=device)
            values = parent[tuple(slice(1, 1 + 2 * size, 2) for size in shape)].copy_(values)
        return values.requires_grad_(needs)

    tensors = {
        "states": floats(rows, tokens, width),
        "norm_weight": floats(width),
        "k_weight": floats(heads * dim, width),
        "v_weight": floats(heads * dim, width),
    }
    for name in ("k_bias", "v_bias"):
        if name in features:
            tensors[name] = floats(heads * dim)
    if "k_norm_weight" in features:
        tensors["k_norm_weight"] = floats(dim)
    turned = dim - 4 if "partial_rope" in features else dim
    for name in ("cos", "sin"):
        if "rope_per_row" in features:
            tensors[name] = floats(rows, tokens, turned, needs=False)
        elif "rope" in features or "partial_rope" in features:
            tensors[name] = floats(tokens, turned, needs=False)
    numbers = {"num_kv_heads": heads, "eps": 1e-5, "norm_offset": 1.0 if "norm_offset" in features else 0.0}
    return tensors, numbers


def leaves(tensors):
    return [x for x in tensors.values() if x.requires_grad]


def results(tensors, numbers, impl, seed=1):
    """K, V and the gradients of all leaves, for upstream gradients that do not depend on the dtype."""
    outputs = audio_kv(**tensors, **numbers, impl=impl)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves(tensors), upstream)]


def in_float64(tensors):
    return {name: x.detach().cpu().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}


def assert_close(got, want, bound):
    for place, (x, y) in enumerate(zip(got, want, strict=True)):
        assert max_error(x.cpu(), y) <= bound * max(1.0, y.abs().max().item()), place


def layers_of(count, *features, **sizes):
    """As :func:`arguments`, with a list of ``count`` for all but the states."""
    made = [arguments(*features, **sizes, seed=seed) for seed in range(count)]
    names = [name for name in made[0][0] if name != "states"]
    return {"states": made[0][0]["states"]} | {name: [x[name] for x, _ in made] for name in names}, made[0][1]


def one_layer(tensors, layer):
    return {name: x[layer] if isinstance(x, list) else x for name, x in tensors.items()}
