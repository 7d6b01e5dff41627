"""One of two processes that train a recipe together, by DDP, or by FSDP2 as accelerate sets it up."""

import os

import torch
from accelerate import state
from accelerate.utils import DistributedType

from palkernels.model.training.run import Stopped
from support.runs import run

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def join_and_train(rank, folder, settings, how, stop_after, port):
    from pathlib import Path

    places = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    os.environ |= places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    if how == "fsdp2":
        os.environ |= SHARDED
        shard_on_cpus()
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked == stop_after and rank == 0

    try:
        run(Path(folder), *settings, resume=True, stop=stop)
    except Stopped:
        assert stop_after is not None
    kind = state.AcceleratorState().distributed_type
    assert kind == (DistributedType.FSDP if how == "fsdp2" else DistributedType.MULTI_CPU), kind
    torch.distributed.barrier()
    os._exit(0)  # an orderly end of Python aborts at times, while a thread of gloo's still runs


def shard_on_cpus():
    """Let accelerate shard a model on CPUs, which it does on devices of every other kind."""
    make = state.PartialState.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = init
