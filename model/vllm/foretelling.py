"""From which hidden states the token behind audio follows: those of the text before it, also of an earlier step.

    rows of a request     1 2 a a | a a a | a 3 4 a a 5     text (1 to 5) and audio (a) of a prompt, in three steps (|)
    audio rows hold           0 2   0 0 2   2     0 4       zeros, or the states of that text row

An audio row has no states of its own. The last one before a text row, and the last one of a step, hold those of the
text row before the audio; all others hold zeros, as those do before which there is no text. Nobody reads them but for
log-probabilities of the prompt.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from palkernels.model.vllm.runs import Run

__all__ = ["LastStates", "carry_over"]

# How many more rows are remembered than running requests could have left: those of requests that are gone stay among
# them until others take their places.
SPARE = 1024


class LastStates:
    """Hidden states of the last row of prompts that go on in a later step.

    A row is known by its slot, which its request keeps while it runs. Of a request that shares a slot with others the
    text so far is the same, and so are the states.

    Args:
        requests: the most that run at a time.
        like: (N, d) hidden states.
    """

    def __init__(self, requests: int, like: Tensor) -> None:
        self.rows = SPARE + 4 * requests
        self.slots = torch.full((self.rows,), -1, dtype=torch.int64, device=like.device)
        self.states = like.new_zeros(self.rows, like.shape[1])
        self.next = 0

    def put(self, slots: Tensor, states: Tensor) -> None:
        """Remember states (n, d) of rows by their slots (n,), and forget the oldest for them."""
        self.slots.masked_fill_((self.slots.unsqueeze(1) == slots).any(1), -1)
        places = (torch.arange(len(slots), device=slots.device) + self.next) % self.rows
        self.slots[places], self.states[places] = slots.long(), states
        self.next = (self.next + len(slots)) % self.rows

    def get(self, slots: Tensor) -> Tensor:
        """Return states (n, d) by slots (n,), NaN where they are forgotten."""
        same = slots.unsqueeze(1) == self.slots
        states = self.states[same.to(torch.uint8).argmax(1)]
        return states.masked_fill(~same.any(1, keepdim=True), torch.nan)

    def put_prompts(self, common: CommonAttentionMetadata, hidden: Tensor) -> None:
        """Remember the last row of each request of a step that is in its prompt.

        Args:
            common: what the runner made for all rows of the step.
            hidden: (N, d) of its rows.
        """
        assert common.is_prefilling is not None
        starts = common.query_start_loc_cpu[: len(common.is_prefilling) + 1].long()  # the others are padding
        going_on = common.is_prefilling.cpu() & (starts[1:] > starts[:-1])
        if bool(going_on.any()):
            rows = (starts[1:][going_on] - 1).to(hidden.device)
            self.put(common.slot_mapping[rows], hidden[rows])

    def get_before(
        self, common: CommonAttentionMetadata, requests: Tensor, positions: Tensor, block_size: int
    ) -> Tensor:
        """Return states (n, d) that are remembered of requests, zeros for those that only begin.

        Args:
            common: what the runner made for all rows of the step.
            requests: (n,) their numbers.
            positions: (n,) of the first row of each in this step.
            block_size: slots in a block.
        """
        before = (positions - 1).clamp(min=0)
        blocks = common.block_table_tensor[requests, before // block_size].long()
        states = self.get(blocks * block_size + before % block_size)
        return states.masked_fill((positions == 0).unsqueeze(1), 0)


def carry_over(
    hidden: Tensor,
    common: CommonAttentionMetadata,
    audio: np.ndarray,
    runs: Sequence[Run],
    positions: Tensor,
    last_states: LastStates,
    block_size: int,
) -> None:
    """Let the last row of audio hold the hidden states of the text before it, where text follows or may follow.

    Args:
        hidden: (N, d) of the rows of a step, which is changed.
        common: what the runner made for them.
        audio: (n,) bool, which of them are audio.
        runs: of its text rows.
        positions: (N,) of the rows in their requests.
        last_states: of earlier steps.
        block_size: slots in a block.
    """
    device, starts = hidden.device, common.query_start_loc_cpu.tolist()
    # Audio at the start of a request's rows: up to its first run of text, or to the end.
    begun = [
        number for number in range(len(starts) - 1) if starts[number] < starts[number + 1] and audio[starts[number]]
    ]
    if begun:
        ends = {run.request: run.first for run in runs if run.before and run.above < 0}
        places = [ends.get(number, starts[number + 1]) - 1 for number in begun]
        first_rows = torch.tensor([starts[number] for number in begun]).to(device)
        requests = torch.tensor(begun).to(device)
        hidden[torch.tensor(places).to(device)] = last_states.get_before(
            common, requests, positions[first_rows], block_size
        )
    pairs = [(run.first - 1, run.above) for run in runs if run.before and run.above >= 0]
    last_runs = {run.request: run for run in sorted(runs, key=lambda run: run.first)}
    pairs += [(run.last + run.behind - 1, run.last - 1) for run in last_runs.values() if run.behind]
    if pairs:
        rows, above = torch.tensor(pairs).to(device).unbind(1)
        hidden[rows] = hidden[above]
