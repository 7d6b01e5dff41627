"""Floating tensors without values, integers with them: what code asks of a model has its true answer."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaForCausalLM

from palkernels.bench.instruments.shapes import Shapes


def test_floating_tensors_take_no_memory() -> None:
    with Shapes():
        a = torch.empty(2**20, 2**20)
        b = (a @ a).softmax(dim=-1)
        c = torch.zeros(3, dtype=torch.bfloat16)
    assert isinstance(b, FakeTensor)
    assert isinstance(c, FakeTensor)
    assert (b.shape, b.dtype, c.dtype) == ((2**20, 2**20), torch.float32, torch.bfloat16)


def test_integers_and_booleans_are_computed() -> None:
    with Shapes():
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[1, :2] = 0
        lengths = mask.sum(dim=1)
        holes = bool((mask.diff(dim=1) < 0).any())
    assert lengths.tolist() == [5, 3]
    assert holes is False


def test_integers_from_floating_tensors_are_zeros() -> None:
    with Shapes():
        tokens = torch.randn(3, 7).argmax(dim=-1)
    assert not isinstance(tokens, FakeTensor)
    assert tokens.tolist() == [0, 0, 0]


def test_a_floating_value_cannot_be_asked_for() -> None:
    with Shapes(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.randn(3).sum().item()
    with Shapes() as mode, mode.zeros_for_values():
        assert [rate.item() for rate in torch.linspace(0.1, 1, 2)] == [0.0, 0.0]


def test_stock_generate_and_training_run() -> None:
    config = LlamaConfig(
        vocab_size=50_000, hidden_size=4096, intermediate_size=16384, num_hidden_layers=2, num_attention_heads=32
    )
    with Shapes():
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(1, 50_000, (2, 9))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        model(ids, labels=ids).loss.backward()
    assert out.shape == (2, 13)
    assert torch.equal(out[:, :9], ids)
    assert all(parameter.grad is not None for parameter in model.parameters())
