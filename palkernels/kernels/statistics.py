"""What the backward pass keeps of each query row: its LSE in base 2, and delta.

The queries' gradient writes these two numbers, the keys' gradient reads them.

They lie in the order in which kernels pack rows, row = t * GROUP + g, in blocks of ROW_BLOCK LSEs and as many deltas. A
tile of rows is one aligned piece of each, so that no row's address is computed, and no mask is needed: zeros fill up
the last block of each (text row, K/V head).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from palkernels.arguments import Call
from palkernels.kernels import tiles


@triton.jit
def row_statistics(ptr, text, batch, kv_head, sizes, GROUP: tl.constexpr, ROW_BLOCK: tl.constexpr):
    """Pointer to the first block of a text row, the one with the number ``batch``, and of a K/V head."""
    blocks = tl.cdiv(text.num_queries * GROUP, ROW_BLOCK)
    # Of the text rows before only the tokens are known, not the blocks: these are at most so many.
    before = (tl.cast(text.batch, tl.int64) * sizes.text_tokens + text.first) * GROUP // ROW_BLOCK + batch
    return ptr + (before * sizes.num_kv_heads + kv_head * blocks) * (2 * ROW_BLOCK)


@triton.jit
def tile_statistics(blocks, first, BLOCK_M: tl.constexpr, ROW_BLOCK: tl.constexpr):
    """Pointers (M,) to LSE and delta of BLOCK_M packed rows from ``first`` on, a multiple of BLOCK_M."""
    lse = blocks + (first // ROW_BLOCK * ROW_BLOCK + first) + tl.arange(0, BLOCK_M)
    return lse, lse + ROW_BLOCK


def row_block(call: Call, capability: int | None) -> int:
    """ROW_BLOCK: a tile of either kernel lies within one block."""
    about = capability, call.query.dtype, call.head_dim, call.is_intricate
    return max(tiles.choose(kernel, *about).block_m for kernel in ("query_gradient", "key_gradient"))


def empty_statistics(call: Call, lse: Tensor, capability: int | None) -> Tensor:
    """Memory for a call's statistics, in its LSE's dtype: two numbers for each row, and a block for each text row."""
    batch, _, num_tokens, _ = call.query.shape
    rows = row_block(call, capability)
    blocks = triton.cdiv(batch * num_tokens * call.group, rows) + call.num_batches
    return torch.empty(2 * call.num_kv_heads * blocks * rows, dtype=lse.dtype, device=lse.device)
