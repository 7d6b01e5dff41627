"""Both methods do the same task on the same model, and leave the model as it was."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from palkernels.bench.methods import IGNORED, METHODS, Batch, Method
from palkernels.bench.presets import LlmPlan
from palkernels.model.connectors import MlpConnector

AUDIO, TEXT, ROWS, VOCAB = 12, 7, 2, 64


def build() -> tuple[Any, nn.Module, Batch]:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlmPlan("tiny", config, 2, None).build(torch.float32, torch.device("cpu"), seed=0).model
    torch.manual_seed(0)
    connector = MlpConnector(16, 32)
    return model, connector, Batch.make(torch.randn(AUDIO, 16), ROWS, TEXT, VOCAB, seed=3)


def test_batch() -> None:
    clip = torch.randn(AUDIO, 16)
    batch = Batch.make(clip, ROWS, TEXT, VOCAB, seed=3)
    assert torch.equal(batch.states, torch.stack([clip, clip]))
    assert batch.input_ids.shape == (ROWS, TEXT)
    assert not torch.equal(batch.input_ids[0], batch.input_ids[1])
    assert (batch.labels[:, 0] == IGNORED).all()
    assert torch.equal(batch.labels[:, 1:], batch.input_ids[:, 1:])
    assert torch.equal(batch.input_ids, Batch.make(clip, ROWS, TEXT, VOCAB, seed=3).input_ids)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_trains_everything(method: Method) -> None:
    model, connector, batch = build()
    with method.ready(model):
        loss = method.loss(model, connector, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.5)  # untrained: a guess
    for name, parameter in [*model.named_parameters(), *connector.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_generates_exactly_what_is_asked_for(method: Method) -> None:
    model, connector, batch = build()
    with method.ready(model) as impl, torch.no_grad():
        tokens = method.generate(model, connector, batch, new_tokens=5)
        assert impl == "sdpa"
    assert tokens.shape == (ROWS, 5)
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_equal_seeds_give_equal_results() -> None:
    results = []
    for _ in range(2):
        model, connector, batch = build()
        losses, tokens = [], []
        for method in METHODS.values():
            with method.ready(model):
                losses.append(method.loss(model, connector, batch).detach())
                with torch.no_grad():
                    tokens.append(method.generate(model, connector, batch, new_tokens=4))
        results.append((torch.stack(losses), torch.cat(tokens)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_audio_reaches_both_methods() -> None:
    model, connector, batch = build()
    silent = Batch(batch.states * 0, batch.input_ids, batch.labels)
    for method in METHODS.values():
        with method.ready(model):
            assert method.loss(model, connector, batch) != method.loss(model, connector, silent)


def test_the_model_is_a_stock_one_between_turns() -> None:
    model, connector, batch = build()
    before = model(batch.input_ids).logits
    implementations = [layer.self_attn.config._attn_implementation for layer in model.model.layers]
    with METHODS["lal"].ready(model):
        METHODS["lal"].loss(model, connector, batch)
    assert torch.equal(model(batch.input_ids).logits, before)
    assert [layer.self_attn.config._attn_implementation for layer in model.model.layers] == implementations
    with (
        pytest.raises(ValueError, match="input_ids"),
        METHODS["lal"].ready(model),
    ):  # a failure inside a turn detaches too
        model()
    assert "forward" not in vars(model)


def test_plits_without_audio_tokens_is_the_model_itself() -> None:
    """The baseline is stock code: its loss is the one that the model gives for the joined sequence."""
    model, connector, batch = build()
    joined = torch.cat([connector(batch.states), model.get_input_embeddings()(batch.input_ids)], dim=1)
    logits = model(inputs_embeds=joined).logits[:, AUDIO:-1]
    expected = nn.functional.cross_entropy(logits.reshape(-1, VOCAB), batch.input_ids[:, 1:].reshape(-1))
    plits = METHODS["plits"]
    with plits.ready(model):
        assert torch.allclose(plits.loss(model, connector, batch), expected, atol=1e-6)
