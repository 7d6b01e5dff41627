"""LAL attention, backward: two kernels, deterministic, with nothing accumulated in memory.

With P = exp(S - LSE), dP = dO V^T and delta = rowsum(dO * O) - dLSE, the gradient of the scores is
dS = P * (dP - delta); then dQ = dS K, dK = dS^T Q, dV = P^T dO ("FlashAttention-2", arXiv 2307.08691, algorithm 2).
The queries' gradient runs first and leaves LSE and delta for the keys': :mod:`palkernels.kernels.statistics`.
"""

from torch import Tensor

from palkernels.arguments import Call
from palkernels.kernels import tiles
from palkernels.kernels.key_gradient import key_gradient_launch
from palkernels.kernels.launch import Launch
from palkernels.kernels.query_gradient import query_gradient_launch


def backward_launches(
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    statistics: Tensor,
    gradients: dict[str, Tensor | None],
    capability: int | None,
) -> list[Launch]:
    """Launches, in order, that fill those of ``gradients`` that are not None, by the names of the five tensors.

    They fill ``statistics``, from :func:`palkernels.kernels.statistics.empty_statistics`, on the way.
    """
    keys = {name: gradients[name] for name in ("key", "audio_key")}
    values = {name: gradients[name] for name in ("value", "audio_value")}
    wants_keys, wants_values = (any(x is not None for x in part.values()) for part in (keys, values))
    if gradients["query"] is None and not (wants_keys or wants_values):
        return []
    launches = [query_gradient_launch(call, out, lse, dout, dlse, statistics, gradients["query"], capability)]
    if wants_keys and wants_values and tiles.splits_key_gradient(call.head_dim):
        launches.append(key_gradient_launch(call, dout, statistics, keys, capability))
        launches.append(key_gradient_launch(call, dout, statistics, values, capability))
    elif wants_keys or wants_values:
        launches.append(key_gradient_launch(call, dout, statistics, keys | values, capability))
    return launches
