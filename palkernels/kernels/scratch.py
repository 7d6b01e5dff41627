"""Memory that launches on one stream use one after another, kept so that a launch need not allocate it.

Counters are zeros between launches. A launch that the GPU has begun comes to its end, or its error ends the CUDA
context and this memory with it; an exception or an interrupt on the host comes before the launch or after it, and
leaves zeros. What may not run to its end has counters of its own, which it clears itself: a launch that a CUDA graph
captures, be the graph replayed or thrown away, and a launch in Triton's interpreter. Launches of one stream must not
overlap, as they might after a stream that still runs was destroyed and another took its handle.
"""

import torch
from torch import Tensor

_kept: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def kept(device: torch.device, stream: int, num_floats: int, num_counters: int) -> tuple[Tensor, Tensor]:
    """At least so many float32, of any value, and so many int32 zeros, which every launch leaves as zeros.

    To be called with ``stream`` the current one. A stream carries out its launches one after another; what one outgrows
    goes back to the allocator, in the order of the same stream, once both of its successors are there.
    """
    found = _kept.get((device, stream))
    if found is None or found[0].shape[0] < num_floats or found[1].shape[0] < num_counters:
        found = (
            torch.empty(1 << (num_floats - 1).bit_length(), dtype=torch.float32, device=device),
            torch.zeros(max(1 << (num_counters - 1).bit_length(), 4096), dtype=torch.int32, device=device),
        )
        _kept[device, stream] = found
    return found
