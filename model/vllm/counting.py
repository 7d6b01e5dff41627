"""How much audio each running request has heard: where some layers, or positions, take texts as if there were none.

Such a step must know how many audio tokens stand before each text token, also of those of earlier steps. A table by the
request's first block remembers. So blocks must not be shared between requests: prefix caching is off.
"""

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import CommonAttentionMetadata

__all__ = ["AudioCounts"]


class AudioCounts:
    """Counts of audio tokens by first block.

    Args:
        blocks: how many there are.
        device: where block tables are.
    """

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.by_block = torch.zeros(blocks, dtype=torch.int64, device=device)

    def before(self, common: CommonAttentionMetadata, positions: Tensor, audio: np.ndarray | None) -> Tensor:
        """Return how many audio tokens (requests,) each request has heard before a step, and count the step's own.

        Args:
            common: what the runner made for all rows of the step.
            positions: (rows,) in their requests, audio counted. A request whose first one is 0 begins, or begins again.
            audio: (rows,) bool, which rows are audio; None: none.
        """
        device = positions.device
        starts = common.query_start_loc_cpu.long()
        scheduled = (starts[1:] > starts[:-1]).nonzero().squeeze(1)  # the others are padding
        first_rows, requests = starts[scheduled].to(device), scheduled.to(device)
        first_blocks = common.block_table_tensor[requests, 0].long()
        before = torch.zeros(common.num_reqs, dtype=torch.int64, device=device)
        before[requests] = torch.where(positions[first_rows] == 0, 0, self.by_block[first_blocks])
        if audio is None:
            self.by_block[first_blocks] = before[requests]
            return before
        total = nn.functional.pad(torch.from_numpy(audio).cumsum(0), (1, 0))
        own = (total[starts[1:]] - total[starts[:-1]])[scheduled].to(device)
        self.by_block[first_blocks] = before[requests] + own
        return before
