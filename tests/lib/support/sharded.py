"""Run one of two processes that train attached models by FSDP2 or DDP, and save losses and gradients."""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from palkernels.model import AudioState, EncodedAudio, MlpConnector, attach
from support.oracles import build


def join(rank, world, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)


def leave():
    dist.barrier()
    os._exit(0)  # an orderly end of Python aborts at times, while a thread of gloo's still runs


def run(rank, world, folder):
    """Train a model with its values and one without, and save the results in "with values.pt" and "without.pt"."""
    join(rank, world, folder)
    for name, empty in (("with values", False), ("without", True)):
        results = sharded_results(rank, world, empty)
        if rank == 0:
            torch.save(results, f"{folder}/{name}.pt")
    leave()


def sharded_results(rank, world, empty):
    mesh = dist.init_device_mesh("cpu", (world,))
    with torch.device("meta" if empty else "cpu"):
        model = build("llama", torch.float64).train()
    attach(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if empty:  # as large models are loaded: without values until each process has its part
        values = build("llama", torch.float64)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for new, old in zip(model.parameters(), values.parameters(), strict=True):
                new.copy_(distribute_tensor(old, mesh, new.placements))
            for new, old in zip(model.buffers(), values.buffers(), strict=True):
                new.copy_(old)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 101, (4, 8), generator=generator)
    states = torch.randn(4, 6, 64, generator=generator, dtype=torch.float64)
    half = slice(2 * rank, 2 * rank + 2)
    half_states = states[half].clone().requires_grad_()
    state = AudioState(half_states, insert_at=torch.tensor([2, 0, 3, 1])[half])
    loss = model(ids[half], labels=ids[half], audio=state).loss
    loss.backward()

    results = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        results[name] = parameter.grad.full_tensor()
    parts = [torch.empty_like(half_states) for _ in range(world)]
    dist.all_gather(parts, half_states.grad)
    results["states"] = torch.cat(parts)
    results["loss"] = loss.detach()
    dist.all_reduce(results["loss"])
    results["loss"] /= world
    return results


def with_connector(layers=3):
    """A model in training with a connector, and a batch for each of two processes: the second's is without audio."""
    model = build("llama", torch.float64, layers=layers).train()
    torch.manual_seed(1)
    handle = attach(model, connector=MlpConnector(10, 64).double())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 101, (2, 2, 8), generator=generator)
    encoded = torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
    return model, handle, ({"input_ids": ids[0], "audio": EncodedAudio(encoded)}, {"input_ids": ids[1]})


WAYS = ("ddp", "fsdp2", "fsdp2 apart")  # the connector in the model's group, or in a group of its own


def run_with_connector(rank, world, folder):
    """Train in each of WAYS and save the gradients in a file of that name."""
    join(rank, world, folder)
    for how in WAYS:
        gradients = gradients_with_connector(rank, world, how)
        if rank == 0:
            torch.save(gradients, f"{folder}/{how}.pt")
    leave()


def gradients_with_connector(rank, world, how):
    model, _, batches = with_connector()
    wrapped = model
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (world,))
        if how == "fsdp2 apart":
            fully_shard(model.palkernels_audio, mesh=mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    batch = batches[rank]
    for _ in range(2):  # DDP complains in the second step of what had no gradient in the first
        model.zero_grad()
        wrapped(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in gradients.items()}
