"""Text rows of a step with audio rows, and the attention metadata with which the stock decoder runs on them alone.

    rows of a step     t t a a a a t t t   a a t t   t      two prompts of text (t) and audio (a), and one that decodes
    runs of text       [0 1]     [6 7 8]       [11 12] [13]

To the attention every run is a request of its own, on the block table of the request that it belongs to. Keys are found
by their slots, so text sees the audio before it, which was written there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend

__all__ = ["Run", "TextRows", "as_if_text", "remembering_backend", "text_runs"]


@functools.lru_cache
def remembering_backend(stock: type[AttentionBackend]) -> type[AttentionBackend]:
    """Return an attention backend whose metadata know, as ``lal``, their builder and what it built them of.

    Raises:
        ValueError: the backend writes keys and values only where it attends.
    """
    if stock.forward_includes_kv_cache_update:
        raise ValueError(
            "the attention backend must write keys and values apart from attending, as FLASH_ATTN, TRITON_ATTN and "
            f"CPU_ATTN do, got {stock.get_name()}: set attention_backend"
        )
    builder: Any = stock.get_builder_cls()

    class RememberingBuilder(builder):  # type: ignore[misc]
        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            metadata.lal = (self, common_attn_metadata)
            return metadata

        def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
            updated = super().update_block_table(metadata, blk_table, slot_mapping)
            common = metadata.lal[1].replace(block_table_tensor=blk_table, slot_mapping=slot_mapping)
            updated.lal = (self, common)
            return updated

    return subclass_attention_backend("Remembering", stock, RememberingBuilder)  # type: ignore[no-any-return]


class Run(NamedTuple):
    """Text rows of one request that follow each other."""

    request: int
    first: int
    last: int  # one past the last row
    position: int  # of the first row in its request
    before: int  # audio rows of this step before it in its request
    behind: int  # rows of this step behind it in its request
    above: int  # the text row of this step before it in its request, behind which audio follows; -1: there is none


def text_runs(common: CommonAttentionMetadata, audio: np.ndarray, limit: int) -> list[list[Run]]:
    """Return all runs of text rows, in as many passes as are needed for ``limit`` runs in each.

    A run reads what earlier runs of its request write, and what other requests write in this very step: a prompt may
    hit blocks of the prefix cache that are being filled. Both stand at smaller positions, so passes go by position.

    Args:
        common: what the runner made for all rows of the step.
        audio: (rows,) bool, which of them are audio.
        limit: the most requests that attention backends have buffers for.
    """
    starts, ends = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
    runs: list[Run] = []
    for request, (first, last) in enumerate(pairwise(starts)):
        if first == last:
            continue  # padding
        edges = np.flatnonzero(np.diff(audio[first:last].astype(np.int8))) + 1 + first
        above = -1
        for start, stop in zip([first, *edges.tolist()], [*edges.tolist(), last], strict=True):
            if audio[start]:
                continue
            before = int(audio[first:start].sum())
            runs.append(Run(request, start, stop, ends[request] - last + start, before, last - stop, above))
            above = stop - 1
    runs.sort(key=lambda run: run.position)
    passes = [runs[i : i + limit] for i in range(0, len(runs), limit)]
    # Backends that tell decoding from prefill by the query's length want the short ones first.
    return [sorted(part, key=lambda run: run.last - run.first) for part in passes]


@dataclass
class TextRows:
    """Text rows of a step, run by run."""

    rows: Tensor  # (n,) their numbers among all rows of the step
    request: Tensor  # (runs,)
    lengths: Tensor  # (runs,)
    audio_before: Tensor  # (runs,) audio rows of this step that stand before each in its request
    common: CommonAttentionMetadata  # as if each run were a request

    @classmethod
    def of_runs(cls, common: CommonAttentionMetadata, runs: list[Run]) -> TextRows:
        """Return the rows of some runs of a step.

        Args:
            common: what the runner made for all rows of the step.
            runs: by :func:`text_runs`.
        """
        device = common.query_start_loc.device
        request, first, last, _, before, behind, _ = torch.tensor(runs, dtype=torch.int64).unbind(dim=1)
        lengths = last - first
        starts = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(common.query_start_loc_cpu.dtype)
        numbers = torch.from_numpy(np.concatenate([np.arange(run.first, run.last) for run in runs]))
        rows, on_device = numbers.to(device), request.to(device)
        prefilling, bounds = common.is_prefilling, common.seq_lens_cpu_upper_bound
        ours = common.replace(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[on_device] - behind.to(common.seq_lens),
            seq_lens_cpu_upper_bound=bounds[request] - behind.to(bounds),
            num_reqs=len(runs),
            num_actual_tokens=len(rows),
            max_query_len=int(lengths.max()),
            block_table_tensor=common.block_table_tensor[on_device],
            slot_mapping=common.slot_mapping[rows],
            positions=None if common.positions is None else common.positions[rows],
            is_prefilling=None if prefilling is None else prefilling[request.to(prefilling.device)],
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return cls(rows, on_device, lengths.to(device), before.to(device), ours)


def as_if_text(
    common: CommonAttentionMetadata, before: Tensor, lengths: Tensor, positions: Tensor, block_size: int
) -> tuple[CommonAttentionMetadata, Tensor]:
    """Return metadata and positions (n,) of text rows as if their requests held no audio: token t in slot t.

    Args:
        common: of requests, or of runs.
        before: (requests,) how much audio stands before each one's rows.
        lengths: (requests,) how many rows each has.
        positions: (n,) of the rows, audio counted.
        block_size: slots in a block.
    """
    request = torch.arange(len(before), device=before.device).repeat_interleave(lengths, output_size=len(positions))
    own = positions - before[request]
    table = common.block_table_tensor
    slots = table[request, own // block_size].to(common.slot_mapping) * block_size + own % block_size
    seq_lens = common.seq_lens - before.to(common.seq_lens)
    return common.replace(seq_lens=seq_lens, slot_mapping=slots, positions=own), own
