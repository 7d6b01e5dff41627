"""Training with audio: memory, precision, frozen FFNs. Gradients against plain training."""

import copy

import pytest
import torch
from support.attached import batch, texts, tiny
from support.oracles import FAMILIES, build
from support.training import TOKENS, WIDTH, gradients, inputs, same
from torch.multiprocessing.reductions import StorageWeakRef

from palkernels.model import AudioState, LalConfig, attach, freeze_ffn
from palkernels.model.connectors.mlp import MlpConnector


@pytest.mark.parametrize(
    ("family", "impl"),
    [*((family, "sdpa") for family in FAMILIES), ("gemma2", "reference"), ("llama", "triton"), ("gemma2", "triton")],
)
def test_recomputed_projections_give_the_same_gradients(family, impl):
    results = []
    for recompute in (False, True):
        model = build(family, torch.float64).train()
        attach(model, LalConfig(recompute_audio_kv=recompute, impl=impl))
        results.append(gradients(model))
    same(*results)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_keeps_no_projection(recompute):
    """After the forward pass, what v_proj made of the audio is alive, or gone; it is made once more, or not."""
    model = build("llama").train()
    attach(model, LalConfig(recompute_audio_kv=recompute))
    made = []

    def note(module, args, out):
        if out.shape[1] == TOKENS:
            made.append(StorageWeakRef(out.untyped_storage()))

    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(note)
    ids, states, _ = inputs(torch.float32)
    loss = model(ids, labels=ids, audio=AudioState(states)).loss
    assert [ref.expired() for ref in made] == [recompute] * 3
    loss.backward()
    assert len(made) == (6 if recompute else 3)


def test_plain_layers_keep_keys_and_values_alone():
    """What audio adds to a training step's memory: K and V of each layer, and the states once, for all of them."""
    model = build("llama").train()
    attach(model)
    ids, _, _ = inputs(torch.float32)
    states = torch.randn(4, 500, WIDTH, requires_grad=True)
    kept = {}

    def keep(tensor):
        if 500 in tensor.shape:
            kept[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, audio=AudioState(states)).loss
    keys_and_values = 3 * 2 * 4 * 500 * 2 * 16 * 4  # layers, K and V, rows, tokens, heads, head dim, bytes
    rotation = 2 * 500 * 16 * 4
    assert sum(kept.values()) == keys_and_values + states.nbytes + rotation
    loss.backward()
    assert states.grad.abs().max() > 0


def test_a_checkpointed_layer_projects_once_more_only():
    model = build("llama").train()
    attach(model, LalConfig(recompute_audio_kv=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, args, out: calls.append(1) if out.shape[1] == TOKENS else None
    )
    ids, states, _ = inputs(torch.float32)
    model(ids, labels=ids, audio=AudioState(states)).loss.backward()
    assert len(calls) == 2


def test_frozen_ffn():
    model = build("llama").train()
    attach(model)
    frozen = freeze_ffn(model)
    ffn = [parameter for name, parameter in model.named_parameters() if ".mlp." in name]
    assert frozen == sum(parameter.numel() for parameter in ffn) > 0
    before = copy.deepcopy(model.state_dict())
    ids, states, _ = inputs(torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(ids, labels=ids, audio=AudioState(states)).loss.backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".mlp." in name), name


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(recompute):
    """float32 weights under bfloat16 autocast: near float32, and every gradient there and float32."""
    model = build("llama").train()
    attach(model, LalConfig(recompute_audio_kv=recompute))
    ids, states, insert_at = inputs(torch.float32)
    exact = model(ids, labels=ids, audio=AudioState(states, insert_at=insert_at)).loss
    states.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, audio=AudioState(states, insert_at=insert_at)).loss
    loss.backward()
    assert abs(float(loss.detach() - exact.detach())) < 0.05
    assert states.grad.dtype == torch.float32
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.eval().generate(ids, audio=AudioState(states.detach()), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_a_hundred_steps(dtype, gap):
    """A small model and its connector, trained with the fused path and with the definition: losses stay together.
    bfloat16 is autocast over float32 weights."""
    losses = {}
    for impl in ("sdpa", "reference"):
        model = build("llama").train()
        for parameter in model.parameters():
            parameter.data.mul_(0.2 if parameter.ndim == 2 else 1.0)  # 0.02, as models are usually initialised
        torch.manual_seed(2)
        handle = attach(model, LalConfig(impl=impl), connector=MlpConnector(10, WIDTH))
        parameters = [*model.parameters(), *handle.connector.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        generator = torch.Generator().manual_seed(4)
        ids = torch.randint(1, 101, (4, 8), generator=generator)
        encoded = torch.randn(4, TOKENS, 10, generator=generator)
        losses[impl] = []
        for _ in range(100):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                state = handle.state(encoded, insert_at=torch.tensor([2, 0, 3, 1]))
                loss = model(ids, labels=ids, audio=state).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(float(loss.detach()))
    gaps = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    assert losses["sdpa"][-1] < 0.1 * losses["sdpa"][0]
    assert gaps[-1] <= gap
    assert dtype != torch.float32 or max(gaps) <= gap  # in bfloat16 the steep part may be passed a step apart


@pytest.mark.parametrize("where", ["forward", "config"])
def test_the_loss_of_a_router_leaves_padding_out(where):
    """Though no layer takes a mask, so that transformers makes none."""
    model = tiny("mixtral", num_local_experts=4).train()
    _, padded, mask = batch(texts(), "right")
    arguments = {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}
    if where == "config":
        model.config.output_router_logits = True
    else:
        arguments["output_router_logits"] = True
    want = model(**arguments)
    attach(model)
    silence = AudioState(torch.randn(3, TOKENS, WIDTH), lengths=torch.zeros(3, dtype=torch.long))
    got = model(**arguments, audio=silence)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss)
