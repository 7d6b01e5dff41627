"""Run one of two processes that train an audio LLM together, one on a batch with audio and one on a batch without."""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from support.audio_llm import AUDIO_TOKEN, INTEGRATIONS, batch_of, build_pal, labelled, open_gates, tone

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


def model_of(name):
    entries, settings = INTEGRATIONS[name]
    return open_gates(build_pal(*entries, **settings))


def batches(model):
    """A batch with audio, and one without."""
    heard = batch_of(model, [f"{AUDIO_TOKEN}is a", "none"], [tone()])
    return labelled(heard), labelled(batch_of(model, ["hello", "none"], []))


def gradients(model, run, batch):
    model.zero_grad(set_to_none=True)
    loss = run(**batch).loss
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in model.named_parameters() if x.requires_grad}


def check_ddp(name, rank):
    model = model_of(name).train()
    heard, text = batches(model)
    want = [gradients(model, model, batch) for batch in (heard, text)]
    parallel = DistributedDataParallel(model)
    for pair in ((heard, text), (text, text), (heard, heard)):  # what each process has
        loss, found = gradients(model, parallel, pair[rank])
        own = [want[0] if batch is heard else want[1] for batch in pair]
        assert torch.equal(loss, own[rank][0]), name
        for parameter, gradient in found.items():
            parts = [0 if part[1][parameter] is None else part[1][parameter] for part in own]
            torch.testing.assert_close(gradient, sum(parts) / 2 + torch.zeros_like(gradient), msg=f"{name} {parameter}")


def check_fsdp(name, rank):
    model = model_of(name)
    heard, text = batches(model)
    prompt = {key: x for key, x in heard.items() if key != "labels"}
    loss, tokens = model(**heard).loss, model.generate(**prompt, **GREEDY)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.language_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(model.generate(**prompt, **GREEDY, synced_gpus=False), tokens), name
    torch.testing.assert_close(model.train()(**heard).loss, loss)
    for pair in ((heard, text), (text, text)):
        _, found = gradients(model, model, pair[rank])
        missing = [parameter for parameter, gradient in found.items() if gradient is None]
        assert not missing, f"{name}: {missing}"


def run(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in ("plits+lal", "flamingo", "summary"):
        check_ddp(name, rank)
        check_fsdp(name, rank)
    dist.barrier()
    if rank == 0:
        open(f"{folder}/done", "w").close()
    os._exit(0)  # an orderly end of Python aborts at times, while a thread of gloo's still runs
