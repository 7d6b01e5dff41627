"""All methods do the same task on the same model, and leave the model as it was."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from palkernels.bench.methods import DEFAULT_METHODS, LEVERS, METHODS, Batch, Method, levers
from palkernels.bench.methods.base import IGNORED_LABEL
from palkernels.bench.methods.plits import POOLED
from palkernels.bench.presets import LlmPlan
from palkernels.model import AudioState, attach
from palkernels.model.connectors.mlp import MlpConnector

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


def test_what_a_class_says_of_its_method() -> None:
    """Attributes are inherited where a method builds on another; what must not be is reset."""
    assert tuple(METHODS) == (*DEFAULT_METHODS, *LEVERS)
    assert LEVERS == ("lal-recompute", "lal-checkpoint", "lal-fused-loss")
    assert [name for name, method in METHODS.items() if method.modes == ("train",)] == list(LEVERS)
    assert [name for name, method in METHODS.items() if method.is_baseline] == ["plits", "plits-tuned"]
    steps = {name: method.step for name, method in METHODS.items() if method.step is not None}
    assert steps == {
        "plits": "",
        "plits-tuned": "the baseline's logits and attention backend",
        "lal-eager": "the integration: audio as keys and values",
        "lal": "our kernels",
    }
    for attribute in ("label", "about", "style"):
        assert len({getattr(method, attribute) for method in METHODS.values()}) == len(METHODS)
    for look in ("color", "marker"):
        assert len({getattr(method.style, look) for method in METHODS.values()}) == len(METHODS)


def test_tokens_by_closed_formulas() -> None:
    """Which audio tokens pass whole layers, which are keys, and for how many tokens keys are kept, by method."""
    expected = {
        "plits": (50, 0, 3 * 57),
        "plits-tuned": (50, 0, 3 * 57),
        "plits-pooled": (13, 0, 3 * 20),
        "lal-eager": (0, 50, 3 * 57),  # each text's cache has its clip's keys
        "lal": (0, 50, 2 * 50 + 3 * 7),
        "pal-multi": (25, 25, 2 * 25 + 3 * 32),
        "pal-unified": (32, 50, 2 * 50 + 3 * 39),
    }
    for name, numbers in expected.items():
        method = METHODS[name]
        assert (method.in_sequence(50), method.as_keys(50), method.cached_tokens(2, 3, 50, 7)) == numbers, name


def test_batch() -> None:
    clip = torch.randn(AUDIO, 16)
    batch = Batch.make(clip, ROWS, TEXT, VOCAB, seed=3)
    assert torch.equal(batch.states, torch.stack([clip, clip]))
    assert batch.input_ids.shape == (ROWS, TEXT)
    assert not torch.equal(batch.input_ids[0], batch.input_ids[1])
    assert (batch.labels[:, 0] == IGNORED_LABEL).all()
    assert torch.equal(batch.labels[:, 1:], batch.input_ids[:, 1:])
    assert torch.equal(batch.input_ids, Batch.make(clip, ROWS, TEXT, VOCAB, seed=3).input_ids)


def open_gates(method: Method, model: Any) -> list[nn.Parameter]:
    """Flamingo's begin closed: no audio, and no gradient but their own. What it trains of its own."""
    own = method.added_parameters(model)
    for parameter in own:
        if parameter.shape == (1,):
            parameter.data.fill_(0.5)
    return own


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_trains_everything(method: Method) -> None:
    model, connector, batch = build()
    with method.ready(model):
        own = open_gates(method, model)
        loss = method.loss(model, connector, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    assert bool(own) == (method.name == "flamingo")
    assert loss.item() == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.5)  # untrained: a guess
    for name, parameter in [*model.named_parameters(), *connector.named_parameters(), *enumerate(own)]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


IMPLS = {"plits-tuned": "sdpa (flash)", "lal-eager": "cat + sdpa"}  # of the others: sdpa


@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_generates_exactly_what_is_asked_for(name: str) -> None:
    model, connector, batch = build()
    method = METHODS[name]
    with method.ready(model) as impl, torch.no_grad():
        tokens = method.generate(model, connector, batch, new_tokens=5)
        assert impl == IMPLS.get(name, "sdpa")
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
                if "infer" not in method.modes:
                    continue
                with torch.no_grad():
                    tokens.append(method.generate(model, connector, batch, new_tokens=4))
        results.append((torch.stack(losses), torch.cat(tokens)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_audio_reaches_every_method() -> None:
    model, connector, batch = build()
    silent = Batch(batch.states * 0, batch.input_ids, batch.labels)
    for method in METHODS.values():
        with method.ready(model):
            open_gates(method, model)
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


def loss_and_gradients(name: str, batch: Batch | None = None) -> dict[str, torch.Tensor]:
    model, connector, made = build()
    method = METHODS[name]
    with method.ready(model):
        loss = method.loss(model, connector, made if batch is None else batch)
        loss.backward()  # type: ignore[no-untyped-call]
    named = [*model.named_parameters(), *connector.named_parameters()]
    return {"loss": loss.detach(), **{key: parameter.grad for key, parameter in named}}


def generated(name: str, batch: Batch | None = None) -> torch.Tensor:
    model, connector, made = build()
    method = METHODS[name]
    with method.ready(model), torch.no_grad():
        return method.generate(model, connector, made if batch is None else batch, new_tokens=5)


@pytest.mark.parametrize(
    ("one", "other"), [("plits-tuned", "plits"), ("lal-eager", "lal"), *((x, "lal") for x in LEVERS)]
)
def test_the_same_function_computed_otherwise(one: str, other: str) -> None:
    """A baseline that is tuned, a lever and LAL by hand cost something else; they compute the same."""
    got, want = loss_and_gradients(one), loss_and_gradients(other)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6, msg=key)
    if one not in LEVERS:
        assert torch.equal(generated(one), generated(other))


def test_pal_is_plits_and_lal_in_one() -> None:
    """Of two encoders' audio, or of a sequence and its summary, one part is placeholders and the other keys and values:
    as attach takes them from any user."""
    model, connector, batch = build()
    states, text = connector(batch.states), model.get_input_embeddings()(batch.input_ids)
    found = {}
    for name in ("pal-multi", "pal-unified"):
        method = METHODS[name]
        with method.ready(model):
            found[name] = method.loss(model, connector, batch)
        assert method.in_sequence(AUDIO) + method.as_keys(AUDIO) == {"pal-multi": AUDIO, "pal-unified": 2 * AUDIO}[name]
        assert method.in_sequence(1000) == {"pal-multi": 500, "pal-unified": 32}[name]
    handle = attach(model)
    # Twelve tokens are fewer than the summary has at most, so it is all of them.
    for name, before, keys in (("pal-multi", states[:, :6], states[:, 6:]), ("pal-unified", states, states)):
        joined = torch.cat([before, text], dim=1)
        logits = model(inputs_embeds=joined, audio=AudioState(keys)).logits[:, before.shape[1] : -1]
        want = nn.functional.cross_entropy(logits.reshape(-1, VOCAB), batch.input_ids[:, 1:].reshape(-1))
        assert torch.allclose(found[name], want, atol=1e-6), name
    handle.detach()


def test_flamingo_with_closed_gates_is_the_text_alone() -> None:
    model, connector, batch = build()
    flamingo = METHODS["flamingo"]
    with flamingo.ready(model):
        loss = flamingo.loss(model, connector, batch)
    want = model(input_ids=batch.input_ids, labels=batch.labels).loss
    assert torch.allclose(loss, want, atol=1e-6)


@pytest.mark.parametrize("tokens", [8, 10])
def test_pooled_is_plits_on_averaged_states(tokens: int) -> None:
    """The last group may be smaller; it is averaged over what it has."""
    batch = Batch.make(torch.randn(tokens, 16), ROWS, TEXT, VOCAB, seed=3)
    groups = [part.mean(dim=1) for part in batch.states.split(POOLED, dim=1)]
    averaged = Batch(torch.stack(groups, dim=1), batch.input_ids, batch.labels)
    assert METHODS["plits-pooled"].in_sequence(tokens) == len(groups)
    got, want = loss_and_gradients("plits-pooled", batch), loss_and_gradients("plits", averaged)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, msg=key)
    assert torch.equal(generated("plits-pooled", batch), generated("plits", averaged))


@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_several_texts_about_one_clip(name: str) -> None:
    """A shared clip is one row of states; results are those of a copy for each text."""
    clip = torch.randn(AUDIO, 16)
    shared = Batch.make(clip, 4, TEXT, VOCAB, seed=3, clips=2)
    assert shared.states.shape == (2, AUDIO, 16)
    assert shared.index is not None
    assert shared.index.tolist() == [0, 0, 1, 1]
    copies = Batch.make(clip, 4, TEXT, VOCAB, seed=3)
    got, want = loss_and_gradients(name, shared), loss_and_gradients(name, copies)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert torch.equal(generated(name, shared), generated(name, copies))


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = METHODS["lal-fused-loss"]
    assert fused.why_not(torch.device("cpu")) == "needs a GPU"
    assert fused.why_not(torch.device("cuda")) is None
    monkeypatch.setattr(levers, "find_spec", lambda name: None)
    assert fused.why_not(torch.device("cuda")) == "liger-kernel is not installed"
    assert [name for name in METHODS if METHODS[name].why_not(torch.device("cpu"))] == ["lal-fused-loss"]


def test_checkpointing_is_off_afterwards() -> None:
    model, _, _ = build()
    with METHODS["lal-checkpoint"].ready(model):
        assert model.training
        assert model.is_gradient_checkpointing
    assert not model.training
    assert not model.is_gradient_checkpointing
