"""How decoding divides a call's keys among programs, and how much memory these need: integers, read from no device."""

from typing import NamedTuple

import torch

from palkernels.arguments import Call

ALIGNED = 4  # float32 values
PROGRAMS_PER_SM = 1  # or a little more, as shares divide: measured faster than 2 to 8 on an H200


class Division(NamedTuple):
    """What decides how the keys are divided among programs, and how much these leave in memory."""

    num_batches: int
    num_audio_rows: int
    num_kv_heads: int
    num_audio: int
    num_keys: int
    num_rows: int  # packed query rows of a text row and K/V head
    head_dim: int
    block_n: int
    multiprocessors: int

    @classmethod
    def of(cls, call: Call, block_n: int, capability: int | None) -> "Division":
        return cls(
            num_batches=call.num_batches,
            num_audio_rows=call.num_audio_rows,
            num_kv_heads=call.num_kv_heads,
            num_audio=call.num_audio,
            num_keys=call.num_keys,
            num_rows=call.num_queries * call.group,
            head_dim=call.head_dim,
            block_n=block_n,
            multiprocessors=multiprocessors_of(call.query.device, capability),
        )

    def shares(self) -> tuple[int, int]:
        """Programs for each audio row's and each text row's keys: as many as keep the GPU's multiprocessors busy."""
        audio, text = -(-self.num_audio // self.block_n), -(-self.num_keys // self.block_n)
        blocks = self.num_kv_heads * (self.num_audio_rows * audio + self.num_batches * text)
        per_program = max(-(-blocks // (PROGRAMS_PER_SM * self.multiprocessors)), 1)
        return -(-audio // per_program), -(-text // per_program)

    def num_programs(self, shares: tuple[int, int]) -> int:
        audio_shares, text_shares = shares
        return self.num_kv_heads * (self.num_audio_rows * audio_shares + self.num_batches * text_shares)

    def num_counters(self) -> int:
        return self.num_batches * self.num_kv_heads

    def places(self, shares: tuple[int, int]) -> tuple[int, int, int, int]:
        """Where ``acc``, ``row_max`` and ``row_sum`` of :class:`Parts` begin in one tensor, and where that ends."""
        rows = self.num_counters() * sum(shares) * self.num_rows
        aligned = -(-rows // ALIGNED) * ALIGNED
        acc = -(-rows * self.head_dim // ALIGNED) * ALIGNED
        return 0, acc, acc + aligned, acc + 2 * aligned


def multiprocessors_of(device: torch.device, capability: int | None) -> int:
    if capability is None:
        return 4  # in the interpreter: shares of several blocks, and several of them
    return torch.cuda.get_device_properties(device).multi_processor_count
